"""A fine-tune from names and options: read the examples, train, write an ordinary folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from compress.artifact import write_model
from compress.device import DTYPES
from compress.errors import ConfigError
from compress.files import check_free, new_folder
from compress.finetune import FinetuneConfig, finetune, read_examples
from compress.result import Progress, Run
from compress.sources import Loaded


def weight_type(name: str | None) -> torch.dtype | None:
    """The dtype behind a name; None stays None.

    Raises:
        ConfigError: the name is not known.
    """
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known: {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def finetune_model(
    loaded: Loaded, data: str, path: Path, config: FinetuneConfig, *, chat: bool, device: str, progress: Progress
) -> float:
    """Fine-tune a model in place and write it; returns the loss over the last tenth of the steps.

    Args:
        loaded: the model.
        data: source of the examples.
        path: a folder that does not exist yet, or is empty.
        config: how.
        chat: whether the chat template is put around prompts and responses.
        device: where.
        progress: told of each step.
    """
    check_free(path)
    scratch = path.absolute().with_name(f".{path.name}.scratch")
    run = Run(progress=progress, device=device, scratch=scratch)
    examples = read_examples(data, loaded.tokenizer, chat=chat)
    loss = finetune(loaded.model, loaded.tokenizer, examples, config, run)
    with new_folder(path) as folder:
        write_model(loaded.model, loaded.tokenizer, folder)
        (folder / "README.md").write_text(_card(loaded, config), encoding="utf-8")
    shutil.rmtree(scratch, ignore_errors=True)  # after an interruption it stays, for the next call
    return loss


def _card(loaded: Loaded, config: FinetuneConfig) -> str:
    """The model card: licence and base of the parent, and how it was trained."""
    origin = loaded.origin
    header = ["---", *([f"license: {origin.licence.lower()}"] if origin.licence else [])]
    header += [f"base_model: {origin.name}"] if origin.kind == "hub" else []
    header += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- foldaway", "---", ""]
    options = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())
    lines = [
        f"# {Path(origin.name).name}, fine-tuned",
        "",
        f"Fine-tuned by foldaway from `{origin.name}` with {options}.",
    ]
    return "\n".join([*header, *lines]) + "\n"
