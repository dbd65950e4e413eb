"""`Client`: a batch server, and the jobs, checks and raw calls that go to it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack, overload

import msgspec

from batchery.client.carry_out import WHOLE, limits_of_job, tables_of_job, window_of
from batchery.client.errors import InputError, InputProblem, SettingsError
from batchery.client.estimate import Cost
from batchery.client.http import Api
from batchery.client.job_request import JobRequest
from batchery.client.making import CHAT, Making
from batchery.client.prepare import fingerprints, prepare_inputs
from batchery.client.server import Server, normalise_base_url, resolve_server
from batchery.client.spending import costs_of
from batchery.client.stored_servers import stored_servers
from batchery.sdk.errors import in_words_of_programs, reworded_problem
from batchery.sdk.job import BatchJob
from batchery.sdk.raw import Batches, Files
from batchery.sdk.rows_file import keep_rows, paths_of
from batchery.sdk.schema import schema_of

T = TypeVar("T")

FOLDER = "batchery-jobs"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)


class RunOptions(TypedDict, total=False):
    """The arguments of `Client.run` beside rows and schema."""

    name: str | None
    output: str | os.PathLike[str] | None
    model: str | None
    template: str | None
    system: str | None
    endpoint: str | None
    image_column: str | None
    image_root: str | os.PathLike[str] | None
    id_column: str | None
    max_tokens: int | None
    body: Mapping[str, Any] | None
    window: str | None
    within: str | None
    by: str | None
    max_cost: float | None
    output_tokens: int | None
    prices: str | os.PathLike[str] | None
    retries: int
    deduplicate: bool
    overwrite: bool


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What a look at rows has found, before anything is sent.

    Attributes:
        rows: how many there are; 0 where some are bad.
        problems: what is wrong, the first thousand.
        problem_count: how much is wrong in all.
        cost: tokens, and US dollars where the price is known; None where rows are bad.
    """

    rows: int = 0
    problems: tuple[InputProblem, ...] = ()
    problem_count: int = 0
    cost: Cost | None = None

    @property
    def ok(self) -> bool:
        """Whether all rows can be sent."""
        return not self.problem_count


class Client:
    """A batch server: Doubleword's, OpenAI's, one of batchery's, or one started for each job.

    Args:
        base_url: of the server; None for what the environment or the settings file names (`BATCHERY_BASE_URL`,
            `DOUBLEWORD_API_KEY`, `OPENAI_BASE_URL` with `OPENAI_API_KEY`).
        api_key: for the server; None for the one that belongs to it there.
        server: the name of a server of the settings file, or `doubleword`, or `openai`.
        upstream: instead of naming a batch server, start one for each job in front of this inference server;
            `simulator` for made-up answers.
        upstream_key_env: the environment variable with the upstream's key.
        max_in_flight: requests in flight to the upstream; None for the server's own choice.
        folder: where jobs keep their output and what they need to go on after an interruption; made when needed.
        progress: show how jobs go; None to do so in a notebook and on a terminal.

    Raises:
        SettingsError: no server is named anywhere, or something about it is wrong.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        server: str | None = None,
        upstream: str | None = None,
        upstream_key_env: str | None = None,
        max_in_flight: int | None = None,
        folder: str | os.PathLike[str] = FOLDER,
        progress: bool | None = None,
    ) -> None:
        self._folder = Path(folder).absolute()
        self._progress = progress
        self._upstream = upstream
        self._upstream_key_env = upstream_key_env
        self._max_in_flight = max_in_flight
        self._server: Server | None = None
        self._jobs: list[BatchJob[Any]] = []
        self._api: Api | None = None
        with in_words_of_programs():
            if upstream is None:
                self._server = server_for(base_url, api_key, server)
            elif base_url is not None or server is not None or api_key is not None:
                raise SettingsError("base_url and server name a batch server, and upstream starts one; say one of them")
            elif upstream != "simulator":
                normalise_base_url(upstream)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop following the jobs that run, which can be gone on with, and end the raw calls."""
        for job in self._jobs:
            job.close()
        self._jobs.clear()
        if self._api is not None:
            self._api.close()
            self._api = None

    @property
    def files(self) -> Files:
        """The Files API of the server."""
        return Files(self._calls())

    @property
    def batches(self) -> Batches:
        """The Batch API of the server."""
        return Batches(self._calls())

    def models(self) -> list[str]:
        """The models that the server has."""
        with in_words_of_programs():
            value, _ = self._calls().models()
        rows = value.get("data") if isinstance(value, dict) else None
        return [row["id"] for row in rows or () if isinstance(row, dict) and isinstance(row.get("id"), str)]

    @overload
    def run(self, rows: Any, *, schema: type[T], **options: Unpack[RunOptions]) -> BatchJob[T]: ...
    @overload
    def run(
        self, rows: Any, *, schema: Mapping[str, Any] | str | None = None, **options: Unpack[RunOptions]
    ) -> BatchJob[Any]: ...
    def run(
        self,
        rows: Any,
        *,
        schema: Any = None,
        name: str | None = None,
        output: str | os.PathLike[str] | None = None,
        model: str | None = None,
        template: str | None = None,
        system: str | None = None,
        endpoint: str | None = None,
        image_column: str | None = None,
        image_root: str | os.PathLike[str] | None = None,
        id_column: str | None = None,
        max_tokens: int | None = None,
        body: Mapping[str, Any] | None = None,
        window: str | None = None,
        within: str | None = None,
        by: str | None = None,
        max_cost: float | None = None,
        output_tokens: int | None = None,
        prices: str | os.PathLike[str] | None = None,
        retries: int = 2,
        deduplicate: bool = False,
        overwrite: bool = False,
    ) -> BatchJob[Any]:
        """Run rows as batches. Returns once all rows are checked and the job is on its way.

        The same rows in the same way are the same job: running them again goes on where an interrupted run stopped,
        or gives what an ended one has, and pays for nothing twice.

        Args:
            rows: a list or another iterable of mappings, prompts (texts) or lists of messages; a DataFrame of pandas or
                polars; a path or glob of JSONL, CSV, TSV or Parquet files, or a list of `pathlib.Path`.
            schema: what answers must follow: a model of pydantic, JSON Schema, or `label: yes|no, score: number`.
            name: of the job, in the client's folder; None for one made of the rows and how they are asked.
            output: the job's output file (JSONL), instead of a name.
            model: for each row; may be a template such as `{{model}}`.
            template: of the user's message, such as `Classify: {{text}}`.
            system: the system prompt, or a template of it.
            endpoint: the API that requests are for; chat completions where None.
            image_column: the column with the path or URL of an image, or several.
            image_root: the folder that image files must be in; None for the input's, or the current one.
            id_column: the column with the `custom_id`.
            max_tokens: the most tokens of an answer.
            body: further fields of each request's body, such as `{"temperature": 0}`.
            window: the completion window, such as `24h` or `1h`.
            within: in what time it should be done, such as `4h`; chooses the window that fits.
            by: when it should be done, such as `06:00`; chooses the window that fits.
            max_cost: refuse what would cost more US dollars than this, or nobody knows how much.
            output_tokens: expected of each answer, for the cost.
            prices: your own price table (TOML).
            retries: how often rows that may yet succeed are run again.
            deduplicate: have identical requests that leave nothing to chance sent once, and answered for all. On a
                server that does not do it every request is sent, and `receipt().deduplicated` is None.
            overwrite: start anew, even if there are results or an unfinished job.

        Raises:
            InputError: rows are bad; nothing was sent.
            OverCostError: it would cost more than `max_cost`; nothing was sent.
            SettingsError: an argument is wrong; nothing was sent.
            ResumeError: another job has this name.
            ClientError: the server cannot be talked to.
        """
        with in_words_of_programs():
            making = making_for(
                model=model,
                template=template,
                system=system,
                endpoint=endpoint,
                schema=schema,
                image_column=image_column,
                image_root=image_root if image_root is not None or paths_of(rows) else Path.cwd(),
                id_column=id_column,
                max_tokens=max_tokens,
                body=body,
            )
            inputs, rows_file, target = self._place(rows, making, name, output)
            request = JobRequest(
                inputs=inputs,
                output=target,
                making=making,
                base_url=None if self._server is None else self._server.base_url,
                window=window,
                within=within,
                by=by,
                max_cost=max_cost,
                output_tokens=output_tokens,
                prices=None if prices is None else str(prices),
                retries=retries,
                deduplicate=deduplicate,
                output_format="jsonl",
                overwrite=overwrite,
                upstream=self._upstream,
                upstream_key_env=self._upstream_key_env,
                max_in_flight=self._max_in_flight,
            )
            job: BatchJob[Any] = BatchJob(
                request, self._server, schema=schema, rows_file=rows_file, show=self._progress
            )
        self._jobs = [job, *(other for other in self._jobs if not other.done)]
        return job

    def check(
        self,
        rows: Any,
        *,
        schema: Any = None,
        window: str | None = None,
        output_tokens: int | None = None,
        prices: str | os.PathLike[str] | None = None,
        **making: Any,
    ) -> Checked:
        """Look at rows, offline: everything that is wrong, or what they would take.

        Args:
            rows: as for `run`.
            schema: as for `run`.
            window: of the prices.
            output_tokens: expected of each answer.
            prices: your own price table (TOML).
            making: the arguments of `run` that say how rows become requests, such as `model` and `template`.

        Raises:
            SettingsError: an argument is wrong.
        """
        with in_words_of_programs(), tempfile.TemporaryDirectory(prefix="batchery-check-") as folder:
            how = making_for(schema=schema, **making)
            inputs = paths_of(rows) or (str(keep_rows(rows, Path(folder))[0]),)
            request = JobRequest(
                inputs=inputs,
                output=None,
                making=how,
                window=window,
                output_tokens=output_tokens,
                prices=None if prices is None else str(prices),
            )
            limits = limits_of_job(request, self._server)
            try:
                prepared = prepare_inputs(inputs, how, None, limits=msgspec.structs.replace(limits, **WHOLE))
            except InputError as error:
                return Checked(problems=tuple(map(reworded_problem, error.problems)), problem_count=error.count)
            chosen = window_of(request, None, lambda _: None)
            (cost,) = costs_of(prepared, tables_of_job(request, limits), [chosen], output_tokens)
            return Checked(rows=prepared.rows, cost=cost)

    def _place(
        self, rows: Any, making: Making, name: str | None, output: str | os.PathLike[str] | None
    ) -> tuple[tuple[str, ...], Path | None, Path]:
        """The files with the rows, that of them which is the job's own, and the job's output."""
        if name is not None and output is not None:
            raise SettingsError("name and output both say where the job is; give one of them")
        if name is not None and not _NAME.fullmatch(name):
            raise SettingsError(
                f"name is up to 100 letters, digits, '.', '_' and '-', and begins with none of the last two marks or a "
                f"'.', not {name!r}"
            )
        target = None if output is None else Path(output).absolute()
        if target is not None and target.suffix.lower() not in (".jsonl", ".ndjson"):
            raise SettingsError(f"output {target} must end with .jsonl; to_parquet and to_csv write other formats")
        folder = self._folder if target is None else target.parent
        if target is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(f"cannot make the folder {folder} for jobs: {error.strerror}") from None
        elif not folder.is_dir():
            raise SettingsError(f"the folder {folder} for the output does not exist")
        paths = paths_of(rows)
        kept: Path | None = None
        if paths is None:
            kept, digest = keep_rows(rows, folder)
        elif target is None and name is None:
            digest = " ".join(found.sha256 for found in fingerprints(paths, making))
        if target is None:
            target = folder / f"{name or self._name_of(digest, making)}.jsonl"
        if paths is not None:
            return paths, None, target
        assert kept is not None
        # By its content, so that a run under the same name with other rows takes nothing away from this one.
        kept = kept.replace(folder / f".{target.stem}.rows-{digest[:16]}.jsonl")
        return (str(kept),), kept, target

    def _name_of(self, digest: str, making: Making) -> str:
        where = self._upstream if self._server is None else self._server.base_url
        return "job-" + hashlib.sha256(f"{digest} {making.fingerprint} {where}".encode()).hexdigest()[:16]

    def _calls(self) -> Api:
        if self._server is None:
            raise SettingsError("this client starts a server for each job, so there is none for raw calls")
        if self._api is None or self._api.is_closed:
            self._api = Api(self._server)
        return self._api


def server_for(base_url: str | None, api_key: str | None, name: str | None = None) -> Server:
    """The server that is meant, with its key.

    Raises:
        SettingsError: none is named anywhere, or something about it is wrong.
    """
    found = resolve_server(base_url, None, os.environ, stored=stored_servers(os.environ), name=name)
    if api_key is None:
        return found
    if not api_key or not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise SettingsError("api_key has characters that no key has; was it copied whole?")
    return Server(found.base_url, api_key, "api_key")


def making_for(
    *,
    model: str | None = None,
    template: str | None = None,
    system: str | None = None,
    endpoint: str | None = None,
    schema: Any = None,
    image_column: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    max_tokens: int | None = None,
    body: Mapping[str, Any] | None = None,
) -> Making:
    """How rows become requests, as the arguments of `Client.run` say.

    Raises:
        SettingsError: names the argument that is wrong.
    """
    schema_name, form = schema_of(schema)
    making = Making(
        model=model,
        endpoint=endpoint or CHAT,
        template=template,
        system=system,
        schema=form,
        schema_name=schema_name,
        image_column=image_column,
        image_root=None if image_root is None or image_column is None else str(Path(image_root).absolute()),
        id_column=id_column,
        max_tokens=max_tokens,
        settings=tuple((f"body.{name}", value) for name, value in (body or {}).items()),
    )
    making.check()
    return making
