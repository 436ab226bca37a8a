"""Open a model in the backend that it asks for, and serve it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.errors import ConfigError, require
from compress.result import Progress, no_progress
from exporters.base import is_export, read_export
from exporters.mapped import give_back_large_blocks
from exporters.onnx_session import graph_of
from serving import vllm_backend
from serving.backend import Backend
from serving.detokenizer import plain_decode
from serving.onnx_backend import OnnxBackend
from serving.scheduler import Scheduler
from serving.torch_backend import TorchBackend

BACKENDS: dict[str, type[OnnxBackend] | type[TorchBackend]] = {"onnx": OnnxBackend, "torch": TorchBackend}

logger = logging.getLogger(__name__)

__all__ = ["BACKENDS", "open_backend", "serve"]


def open_backend(path: str | Path, backend: str | None = None, *, device: str = "cpu") -> Backend:
    """Load what is to be served.

    Args:
        path: an ONNX export folder, or anything that ``compress.sources.load`` takes.
        backend: key in BACKENDS; None takes onnx for an ONNX folder and torch for the rest. vLLM is no such backend: it
            brings a server of its own.
        device: "cpu", or for torch "cuda" or "cuda:N".

    Raises:
        ConfigError: no such backend, model or device.
        BackendError: the runtime cannot load it.
    """
    name = backend or _guess(path)
    if name == vllm_backend.NAME:
        raise ConfigError(f"{path} is for vLLM, which is a server of its own: foldaway serve {path} --backend vllm")
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is not known; known are {', '.join([*BACKENDS, vllm_backend.NAME])}")
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
    deltas: Sequence[tuple[str, str]] = (),
    flags: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    say: Callable[[str], None] = logger.info,
    quiet: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Serve a model until SIGINT or SIGTERM; what was accepted by then is finished first.

    Args:
        path: as for `open_backend`, like `device`; or what `vllm_backend.serve` takes.
        backend: key in BACKENDS or "vllm", or None to choose by what `path` is.
        host: the address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        served_model_name: the model's name towards clients; None takes the folder's or file's name.
        max_model_len: the most tokens of a sequence; None takes the model's.
        max_batch: the most answers that are generated at the same time.
        api_key: bearer key to ask for; None asks for none.
        device: where torch runs.
        deltas: vllm: see `vllm_backend.serve`, like `flags`, `say`, `quiet` and `progress`.
        ready: told the base URL, once requests are answered.

    Raises:
        BackendError: the port is taken, or the runtime cannot load the model.
        ConfigError: an option or a path that cannot be meant.
        KeyboardInterrupt: a second signal forced the end.
        MissingExtra: the HTTP packages or vLLM are not installed.
        FoldawayError: what else `vllm_backend.serve` raises.
    """
    chosen = backend or _guess(path)
    if chosen == vllm_backend.NAME:
        if device != "cpu":
            raise ConfigError(f"device {device}: vLLM computes where it was installed for; see CUDA_VISIBLE_DEVICES")
        vllm_backend.serve(
            path,
            host=host,
            port=port,
            served_model_name=served_model_name,
            max_model_len=max_model_len,
            api_key=api_key,
            deltas=deltas,
            flags=flags,
            ready=ready,
            say=say,
            quiet=quiet,
            progress=progress,
        )
        return
    if flags or deltas:
        raise ConfigError(f"{'flags after --' if flags else '--delta'}: for --backend vllm, and this is {chosen}")
    for module in ("fastapi", "uvicorn"):
        require(module, "serve")
    from serving.server import bind, run

    sock = bind(host, port)  # before the model is loaded: a port in use should not cost a minute
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
        to = read_export(folder).to
        return to if to in ("onnx", vllm_backend.NAME) else "torch"
    return "onnx" if graph_of(folder) else "torch"
