"""`batchery llama`: serve a local GGUF model, as an upstream for batches, in the foreground."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """
Examples:

  batchery llama qwen.gguf --port 8000

  batchery serve --upstream http://127.0.0.1:8000/v1

  batchery run requests.jsonl -o results.jsonl --upstream qwen.gguf
"""
CONTEXT_SETTINGS = {"auto_envvar_prefix": "BATCHERY_LLAMA"}
PARALLEL = 8
"""Requests at once unless told otherwise: what a small machine still gains from."""


def llama(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The model.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")] = 9000,
    name: Annotated[
        str | None,
        typer.Option(help="What the model is called. Requests may name any model.", show_default="the file's name"),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests worked on at once.")] = PARALLEL,
    context: Annotated[
        int,
        typer.Option(
            min=0,
            max=1 << 20,
            help="Tokens of one request, prompt and answer; 0: what the model was trained with, shared out.",
        ),
    ] = 4096,
    gpu_layers: Annotated[
        int | None, typer.Option(min=0, help="Layers on the GPU; 0 for none.", show_default="as many as fit")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Serve /v1/embeddings instead of text.")] = False,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Environment variable with the key that requests must carry.", show_default="no key"
        ),
    ] = None,
) -> None:
    """Serve a local GGUF model with llama.cpp, as an upstream for batches."""
    from batchery.cli.options import fail  # noqa: PLC0415
    from batchery.upstreams.llama import LlamaServer, ModelError  # noqa: PLC0415

    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env)
        if not key:
            fail(f"--api-key-env names {api_key_env}, but that environment variable is not set")
    # Its threads are not to take them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        server = LlamaServer(
            model,
            host=host,
            port=port,
            name=name or model.stem,
            parallel=parallel,
            context=context,
            gpu_layers=gpu_layers,
            embeddings=embeddings,
            api_key=key,
        )
    except ModelError as error:
        fail(str(error))
    typer.echo(f"batchery llama listening on {server.url}")
    sys.stdout.flush()
    signal.sigwait((signal.SIGTERM, signal.SIGINT))
    sys.stderr.flush()
    os._exit(0)  # it has nothing to save, and its threads would finish what they generate first
