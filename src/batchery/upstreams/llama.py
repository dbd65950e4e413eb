"""A local GGUF model behind an OpenAI-compatible server: llama.cpp, in this process, from the `llama` extra.

It only sets llama.cpp up. It must never download anything: the model is a file that is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAGIC = b"GGUF"


class ModelError(Exception):
    """A model that cannot be served; it says which, why, and what helps."""


class LlamaServer:
    """llama.cpp's server; it ends with the process.

    Args:
        model: a GGUF file.
        host: address to listen on.
        port: to listen on; 0 takes any free one.
        name: what the model is called in `GET /v1/models`.
        parallel: requests worked on at once; more wait in order.
        context: tokens that each of them may have, prompt and answer together; 0 for what the model was
            trained with, divided among them.
        gpu_layers: layers on the GPU; None for as many as fit.
        embeddings: serve `/v1/embeddings` instead of text.
        api_key: what requests must carry.

    Attributes:
        url: where it listens.

    Raises:
        ModelError: the file is none, or llama.cpp cannot load it, or is not installed.
    """

    def __init__(
        self,
        model: Path,
        *,
        host: str,
        port: int,
        name: str,
        parallel: int,
        context: int,
        gpu_layers: int | None,
        embeddings: bool,
        api_key: str | None,
    ) -> None:
        require_gguf(model)
        try:
            import xllamacpp  # noqa: PLC0415 - an extra
        except ImportError:
            raise ModelError("a local model needs an extra package: pip install 'batchery[llama]'") from None
        parameters: Any = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.model_alias = {name}
        parameters.hostnames = [host]
        parameters.port = port
        parameters.n_parallel = parallel
        parameters.n_ctx = context * parallel  # llama.cpp divides it among them
        parameters.kv_unified = False
        if gpu_layers is not None:
            parameters.n_gpu_layers = gpu_layers
        parameters.embedding = embeddings
        if embeddings:
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        parameters.endpoint_metrics = True
        parameters.ui = False
        if api_key is not None:
            parameters.api_keys = [api_key]
        try:
            self._server = xllamacpp.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"llama.cpp cannot serve {model}: {error}. Its log above may say more.") from None
        self.url: str = self._server.listening_address


def require_gguf(path: Path) -> None:
    """Raises ModelError unless there is a GGUF file."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
    if magic != MAGIC:
        raise ModelError(f"{path} is not a GGUF model: it does not begin with {MAGIC.decode()}")
