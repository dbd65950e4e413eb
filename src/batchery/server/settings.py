"""The settings of a server and its workers: flag beats environment beats file beats default.

Every setting is a flag of `batchery serve`, an environment variable (`BATCHERY_` and its name in capitals) and a key of
`batchery.toml` in the current folder, or of the file that `--config` names.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from batchery.engine.egress import Network, parse_networks
from batchery.store.database import async_url, sqlite_url
from batchery.wire import strict_json
from batchery.wire.lines import MAX_FILE_BYTES, MAX_LINE_BYTES, MAX_REQUESTS, Limits
from batchery.wire.prices import Prices, parse_prices
from batchery.wire.windows import DEFAULT_WINDOWS, parse_windows

CONFIG_FILE = Path("batchery.toml")

YIELD_SHARE = 0.5
"""Of what an upstream works on that is given up for others there, where nobody has said how far."""


def _windows(value: Any) -> Any:
    return parse_windows(value) if isinstance(value, str) else value


def _networks(value: Any) -> Any:
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        value = ",".join(value)
    return tuple(map(str, parse_networks(value))) if isinstance(value, str) else value


def _prices(value: Any) -> str:
    """A table of the file, or its JSON in the environment, once it is known to be good."""
    if not isinstance(value, str):
        parse_prices(value)
        return json.dumps(value)
    try:
        parse_prices(strict_json.loads(value.encode(errors="surrogateescape")))
    except strict_json.NotJson as error:
        raise ValueError(f"prices is not valid JSON: {error}") from None
    return value


class Settings(BaseSettings):
    """What `batchery serve` and `batchery worker` can be told."""

    config_file: ClassVar[Path] = CONFIG_FILE

    model_config = SettingsConfigDict(env_prefix="BATCHERY_", extra="forbid", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    data_dir: Path = Path("batchery-data")
    database: str | None = None
    store: str | None = None
    upstream: str = Field(min_length=1)
    upstream_key_env: str | None = None
    max_in_flight: int | None = Field(None, ge=1, le=65_536)
    requests_per_minute: int | None = Field(None, ge=1, le=100_000_000)
    tokens_per_minute: int | None = Field(None, ge=1, le=1_000_000_000_000)
    yield_to_interactive: float | None = Field(None, ge=0, le=1)
    upstream_metrics: str = "auto"
    request_timeout: float = Field(600.0, gt=0, le=86_400)
    cancel_grace: float = Field(10.0, ge=0, le=600)
    stop_grace: float = Field(10.0, ge=0, le=600)
    # Not parsed as JSON from the environment: it is a list as people write one, `24h,1h`.
    completion_windows: Annotated[tuple[str, ...] | str, BeforeValidator(_windows)] = DEFAULT_WINDOWS
    max_file_bytes: int = Field(MAX_FILE_BYTES, ge=1)
    max_line_bytes: int = Field(MAX_LINE_BYTES, ge=1, le=1 << 31)
    max_requests: int = Field(MAX_REQUESTS, ge=1, le=1 << 31)
    max_uploads: int = Field(64, ge=1, le=65_536)
    max_downloads: int = Field(256, ge=1, le=65_536)
    # Likewise a list as people write one; kept as text, so that a worker gets it through its environment as it is.
    webhook_networks: Annotated[tuple[str, ...] | str, BeforeValidator(_networks)] = ()
    # A table by model, kept as its JSON for the same reason.
    prices: Annotated[str, BeforeValidator(_prices)] = "{}"
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    @field_validator("database")
    @classmethod
    def _database(cls, value: str | None) -> str | None:
        return None if value is None else async_url(value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, cls.config_file)

    @property
    def windows(self) -> tuple[str, ...]:
        """The completion windows on offer."""
        windows = self.completion_windows
        assert not isinstance(windows, str)
        return windows

    @property
    def allowed_networks(self) -> tuple[Network, ...]:
        """The networks that webhooks may go to besides the public internet."""
        return parse_networks(",".join(self.webhook_networks))

    @property
    def price_list(self) -> Prices:
        """What tokens cost, by model."""
        return parse_prices(strict_json.loads(self.prices.encode()))

    @property
    def limits(self) -> Limits:
        """What an input file may be."""
        return Limits(self.max_file_bytes, self.max_line_bytes, self.max_requests)

    @property
    def yield_share(self) -> float:
        """Of what the upstream works on that is given up at most for others there; a number of requests in flight that
        the operator has set is kept to, unless both are."""
        if self.yield_to_interactive is not None:
            return self.yield_to_interactive
        return YIELD_SHARE if self.max_in_flight is None else 0.0

    @property
    def database_url(self) -> str:
        """The database: the one named, else a file in the data folder."""
        return self.database or sqlite_url(self.data_dir / "batchery.db")

    @property
    def uses_folder(self) -> bool:
        """Whether the database lies in the data folder, so that this machine alone can use it."""
        return self.database is None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
