"""The settings of a server and its workers: flag beats environment beats file beats default.

Every setting is a flag of `batchery serve`, an environment variable (`BATCHERY_` and its name in capitals) and a key of
`batchery.toml` in the current folder, or of the file that `--config` names.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
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


def _split(value: Any) -> Any:
    """A list as people write one, `a,b` or `a b`, or as a file has it; its entries as text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return (str(value),)
    if isinstance(value, list | tuple):
        parts = [str(entry) for entry in value if isinstance(entry, str | int | float) and not isinstance(entry, bool)]
        value = ",".join(parts) if len(parts) == len(value) else value
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _each(read: Callable[[str], object]) -> Callable[[Any], Any]:
    """Reads a setting that is given once for all upstreams, or once for each in their order; kept as text."""

    def split(value: Any) -> Any:
        found = _split(value)
        if isinstance(found, tuple):
            for entry in found:
                read(entry)
        return found

    return split


def _number(
    kind: type[int] | type[float], least: float, most: float, word: str | None
) -> Callable[[str], float | None]:
    def read(text: str) -> float | None:
        if text == word:
            return None
        try:
            number = kind(text)
        except ValueError:
            number = kind(least - 1)
        if not least <= number <= most:
            whole = "a whole number" if kind is int else "a number"
            also = "" if word is None else f", or {word}"
            raise ValueError(f"{text!r} is not {whole} from {least:g} to {most:.15g}{also}")
        return number

    return read


_in_flight = _number(int, 1, 65_536, "auto")
_requests = _number(int, 1, 100_000_000, "none")
_tokens = _number(int, 1, 1_000_000_000_000, "none")
_share = _number(float, 0, 1, None)

_Each = tuple[str, ...] | str


class UpstreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream, and how it is used.

    Attributes:
        url: its base URL, as it was given.
        key_env: the environment variable with its key; None for no key.
        metrics: where its own metrics are: `auto`, `off` or a URL.
        max_in_flight: requests there at once; None to find out how many are best.
        requests_per_minute, tokens_per_minute: what each worker may send it in any minute; None for no limit.
        yield_share: of what it works on that is given up at most for others there, 0 to 1.
    """

    url: str
    key_env: str | None
    metrics: str
    max_in_flight: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    yield_share: float


class Settings(BaseSettings):
    """What `batchery serve` and `batchery worker` can be told."""

    config_file: ClassVar[Path] = CONFIG_FILE

    model_config = SettingsConfigDict(env_prefix="BATCHERY_", extra="forbid", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    data_dir: Path = Path("batchery-data")
    database: str | None = None
    store: str | None = None
    upstream: Annotated[_Each, BeforeValidator(_split)]
    # Of the upstreams, each given once for all of them or once for each; kept as text, so that a worker gets them
    # through its environment as they are.
    upstream_key_env: Annotated[_Each, BeforeValidator(_split)] = ()
    max_in_flight: Annotated[_Each, BeforeValidator(_each(_in_flight))] = ()
    requests_per_minute: Annotated[_Each, BeforeValidator(_each(_requests))] = ()
    tokens_per_minute: Annotated[_Each, BeforeValidator(_each(_tokens))] = ()
    yield_to_interactive: Annotated[_Each, BeforeValidator(_each(_share))] = ()
    upstream_metrics: Annotated[_Each, BeforeValidator(_split)] = ("auto",)
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

    @field_validator("upstream")
    @classmethod
    def _upstream(cls, value: _Each) -> _Each:
        if not value:
            raise ValueError("name an inference server, such as http://127.0.0.1:8000/v1")
        return value

    @field_validator(
        "upstream_key_env",
        "max_in_flight",
        "requests_per_minute",
        "tokens_per_minute",
        "yield_to_interactive",
        "upstream_metrics",
    )
    @classmethod
    def _one_or_each(cls, value: _Each, info: ValidationInfo) -> _Each:
        upstreams = len(info.data.get("upstream") or value)  # a command without upstreams may read settings of one with
        if len(value) > 1 and len(value) != upstreams:
            raise ValueError(
                f"there are {len(value)} of it and {upstreams} of --upstream; give one for all, or one for each in "
                "their order"
            )
        return value

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
    def upstreams(self) -> tuple[UpstreamSettings, ...]:
        """Each upstream, with what was said of it."""
        urls = self.upstream
        assert isinstance(urls, tuple)
        found = []
        for place, url in enumerate(urls):
            key_env = _of(self.upstream_key_env, place)
            limit = _of(self.max_in_flight, place)
            requests = _of(self.requests_per_minute, place)
            tokens = _of(self.tokens_per_minute, place)
            share = _of(self.yield_to_interactive, place)
            max_in_flight = None if limit is None or limit == "auto" else int(limit)
            # A number of requests in flight that the operator has set is kept to, unless both are.
            yields = YIELD_SHARE if max_in_flight is None else 0.0
            found.append(
                UpstreamSettings(
                    url=url,
                    key_env=None if key_env == "none" else key_env,
                    metrics=_of(self.upstream_metrics, place) or "auto",
                    max_in_flight=max_in_flight,
                    requests_per_minute=None if requests is None or requests == "none" else int(requests),
                    tokens_per_minute=None if tokens is None or tokens == "none" else int(tokens),
                    yield_share=yields if share is None else float(share),
                )
            )
        return tuple(found)

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


def _of(values: _Each, place: int) -> str | None:
    """What was said for an upstream; None if nothing was."""
    return values[place if len(values) > 1 else 0] if values else None
