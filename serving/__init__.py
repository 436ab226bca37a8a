"""A model behind HTTP: an ONNX export or a Hugging Face model, served with OpenAI's routes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.errors import ConfigError, require
from exporters.base import is_export, read_export
from exporters.mapped import give_back_large_blocks
from exporters.onnx_session import graph_of
from serving.backend import Backend
from serving.detokenizer import plain_decode
from serving.onnx_backend import OnnxBackend
from serving.scheduler import Scheduler
from serving.torch_backend import TorchBackend

BACKENDS: dict[str, type[OnnxBackend] | type[TorchBackend]] = {"onnx": OnnxBackend, "torch": TorchBackend}

__all__ = ["BACKENDS", "open_backend", "serve"]


def open_backend(path: str | Path, backend: str | None = None, *, device: str = "cpu") -> Backend:
    """Load what is to be served.

    Args:
        path: an ONNX export folder, or anything that ``compress.sources.load`` takes.
        backend: key in BACKENDS; None takes onnx for an ONNX folder and torch for the rest.
        device: "cpu", or for torch "cuda" or "cuda:N".

    Raises:
        ConfigError: no such backend, model or device.
        BackendError: the runtime cannot load it.
    """
    name = backend or _guess(path)
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is not known; known are {', '.join(BACKENDS)}")
    return BACKENDS[name].open(str(path), device=device)


def serve(
    path: str | Path,
    *,
    backend: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    max_model_len: int | None = None,
    max_batch: int = 8,
    api_key: str | None = None,
    device: str = "cpu",
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM; what was accepted by then is finished first.

    Args:
        path: as for `open_backend`, like `backend` and `device`.
        backend: key in BACKENDS, or None to choose by what `path` is.
        host: the address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        served_model_name: the model's name towards clients; None takes the folder's or file's name.
        max_model_len: the most tokens of a sequence; None takes the model's.
        max_batch: the most answers that are generated at the same time.
        api_key: bearer key to ask for; None asks for none.
        device: where torch runs.
        ready: told the base URL, once requests are answered.

    Raises:
        BackendError: the port is taken, or the runtime cannot load the model.
        ConfigError: an option or a path that cannot be meant.
        MissingExtra: the HTTP packages are not installed.
    """
    for module in ("fastapi", "uvicorn"):
        require(module, "serve")
    from serving.server import bind, run

    sock = bind(host, port)  # before the model is loaded: a port in use should not cost a minute
    chosen = backend or _guess(path)
    if chosen == "onnx":
        give_back_large_blocks()
    try:
        opened = open_backend(path, chosen, device=device)
        if served_model_name is not None:
            opened.model_id = served_model_name
        decode = plain_decode(opened.tokenizer)
        scheduler = Scheduler(opened, decode, max_model_len=max_model_len, max_batch=max_batch)
    except BaseException:
        sock.close()
        raise
    run(sock, scheduler, api_key=api_key, ready=ready)


def _guess(path: str | Path) -> str:
    folder = Path(path).expanduser()
    if is_export(folder):
        return "onnx" if read_export(folder).to == "onnx" else "torch"
    return "onnx" if graph_of(folder) else "torch"
