"""`batchery mcp`: an MCP server on stdin and stdout, with which agents validate, submit, follow and retry batches.

Its tools run the scripts of the agent skill, so that both keep the same state beside the input and resume alike. The
server and the key are chosen by whoever starts it; no tool can name another, and none ever sees the key.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

EPILOG = """
Examples:

  batchery mcp --base-url http://127.0.0.1:8080/v1

  claude mcp add batchery -- batchery mcp --base-url http://127.0.0.1:8080/v1

The server and the key are found as for batchery run: by these options, else from BATCHERY_BASE_URL with
BATCHERY_API_KEY, DOUBLEWORD_API_KEY, or OPENAI_BASE_URL with OPENAI_API_KEY.
"""
INSTRUCTIONS = (
    "Run many independent AI requests as a batch. Write a JSONL file, validate it, submit it once, then ask for its "
    "results until the status is completed. Paths are on the machine where this server runs. Every tool may be called "
    "again: submitting the same file twice gives the same batch and costs nothing more."
)
MOST_ROWS = 100
LONGEST_WAIT = 300
GOOD = {0: "ok", 3: "some requests failed", 4: "the batch failed, expired or was cancelled", 8: "still running"}
"""Exit codes of the scripts with which they have something to show."""


def mcp(
    base_url: Annotated[str | None, typer.Option(metavar="URL", help="The batch server.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the key.")
    ] = None,
) -> None:
    """Serve batches to agents that speak the Model Context Protocol, over stdin and stdout."""
    from batchery.client.errors import SettingsError  # noqa: PLC0415
    from batchery.client.server import resolve_server  # noqa: PLC0415

    try:
        server = resolve_server(base_url, api_key_env, os.environ)
    except SettingsError as error:
        _fail(str(error))
    try:
        tools = build({"DOUBLEWORD_BASE_URL": server.base_url, "DOUBLEWORD_API_KEY": server.api_key or ""})
    except ImportError:
        _fail("batchery mcp needs an extra package: pip install 'batchery[mcp]'")
    tools.run("stdio")


def build(environment: dict[str, str]) -> MCPServer[Any]:
    """The MCP server.

    Args:
        environment: tells the scripts which server, and the key.

    Raises:
        ImportError: the extra `mcp` is not installed.
    """
    from mcp.server.mcpserver import MCPServer  # noqa: PLC0415

    tools: MCPServer[Any] = MCPServer("batchery", instructions=INSTRUCTIONS)

    async def run(script: str, options: dict[str, Any], *arguments: str) -> dict[str, Any]:
        return await run_script(environment, script, options, *arguments)

    @tools.tool()
    async def validate(file: str) -> dict[str, Any]:
        """Check a batch input file (JSONL), offline: every bad line with its reason, and how many requests it has."""
        return await run("validate_batch_file.py", {"json": True}, file)

    @tools.tool()
    async def submit(file: str, window: str = "24h", new: bool = False, deduplicate: bool = False) -> dict[str, Any]:
        """Upload a batch input file and create its batch. This costs money, once: a repeated call gives the same batch.

        window is 24h (cheaper) or 1h (faster). new makes another batch, although one was made from this file.
        deduplicate sends identical requests with temperature 0 or a seed once, on a server that can; log tells if not.
        """
        return await run("submit_batch.py", {"window": window, "new": new, "deduplicate": deduplicate}, file)

    @tools.tool()
    async def status(batch: str) -> dict[str, Any]:
        """The batch of a submitted file, or with an id: status, counts and file ids."""
        return await run("manage_batches.py", {}, "status", batch)

    @tools.tool()
    async def list_batches(limit: int = 20, after: str = "") -> dict[str, Any]:
        """The newest batches; after is the last id of the page before."""
        return await run("manage_batches.py", {"limit": limit, "after": after}, "list")

    @tools.tool()
    async def results(batch: str, wait_seconds: int = 0, offset: int = 0, limit: int = 20) -> dict[str, Any]:
        """Fetch the new results of a submitted file (or of a batch id), and show some; it may still be running.

        All results are appended to a file, whose path is in the answer. wait_seconds (at most 300) follows the batch
        for so long if it has not ended. rows are result lines from offset on, at most limit (100).
        """
        wait = max(0, min(wait_seconds, LONGEST_WAIT))
        found = await run("watch_batch.py", {"timeout": wait} if wait else {"once": True}, batch)
        shown = max(0, min(limit, MOST_ROWS))
        for name, path in (("rows", "results"), ("error_rows", "errors")):
            found[name] = await asyncio.to_thread(rows_of, Path(found[path]), max(0, offset), shown)
        return found

    @tools.tool()
    async def cancel(batch: str) -> dict[str, Any]:
        """Cancel the batch of a submitted file, or with an id. What is finished stays and can be fetched."""
        return await run("manage_batches.py", {}, "cancel", batch)

    @tools.tool()
    async def retry(file: str, permanent: bool = False, submit: bool = True) -> dict[str, Any]:
        """Run again what failed for a passing reason or never ran. Ask for the results until it has ended first.

        permanent also takes what failed for good. submit=false only writes the file. Follow the new file afterwards.
        """
        return await run("retry_failed.py", {"all": permanent, "submit": submit}, file)

    @tools.tool()
    async def list_models() -> dict[str, Any]:
        """The models that can be asked."""
        return await run("manage_batches.py", {}, "models")

    return tools


async def run_script(
    environment: dict[str, str], name: str, options: dict[str, Any], *arguments: str
) -> dict[str, Any]:
    """Run a script of the skill; what it printed, with `outcome` and what it said to people as `log`.

    Raises:
        ToolError: it has nothing to show; the message is what it said.
    """
    from mcp.server.mcpserver.exceptions import ToolError  # noqa: PLC0415

    from batchery.cli.skill import source  # noqa: PLC0415

    flags = [f"--{option}" if value is True else f"--{option}={value}" for option, value in options.items() if value]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(source() / "scripts" / name),
        *flags,
        "--",  # whatever the rest begins with, it is no option
        *arguments,
        env=os.environ | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        printed, told = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    log = told.decode("utf-8", "replace").strip()[-4000:]
    code = process.returncode if process.returncode is not None else 1
    if not printed or (code not in GOOD and name != "validate_batch_file.py"):
        raise ToolError(log or f"{name} ended with {code}")
    found: dict[str, Any] = json.loads(printed)
    return {**found, "outcome": GOOD.get(code, "invalid"), "log": log}


def rows_of(path: Path, offset: int, limit: int) -> list[Any]:
    """Some lines of a result file, decoded; what could not be told on, such as half of an emoji or NaN, is replaced."""
    from batchery.client.results import read_record, whole_characters  # noqa: PLC0415

    if not path.exists():
        return []
    with path.open("rb") as file:
        records = [read_record(line) for line in islice(file, offset, offset + limit)]
    whole: list[Any] = json.loads(whole_characters(json.dumps(records, ensure_ascii=False)))
    return whole


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(1)
