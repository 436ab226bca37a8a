"""Tiny random models, one per architecture: seeded, cached, of sizes that are all different and awkward."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from compress import sources
from compress.calibration import TokenRows

# L blocks, D hidden, F neurons, H query heads, K KV heads, head_dim, V vocabulary.
L, D, F, H, K, HEAD_DIM, V = 5, 64, 80, 4, 2, 16, 259
CONTEXT = 64

_COMMON = {
    "num_hidden_layers": L,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": HEAD_DIM,
    "vocab_size": V,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    # Sliding and full attention mixed: a removal that renumbers the wrong list changes their places.
    "gemma3_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "query_pre_attn_scalar": HEAD_DIM,
    },
    "phi3": {"original_max_position_embeddings": CONTEXT},
    "opt": {"ffn_dim": F, "word_embed_proj_dim": D, "dropout": 0.0, "init_std": 0.2},
    "gpt2": {"n_inner": F},
}
ARCHITECTURES = sorted(TINY)


@functools.cache
def _tiny(model_type: str) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**_COMMON, **TINY[model_type]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases that differ from their neutral start, so that losing one shows.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert torch.isfinite(parameter).all(), name
    return model


def tiny(model_type: str) -> PreTrainedModel:
    """A random model of one architecture; a fresh copy each time."""
    return copy.deepcopy(_tiny(model_type))


def token_rows(rows: int = 3, length: int = 24, seed: int = 0) -> TokenRows:
    """Random calibration rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (rows, length), generator=generator)
    return TokenRows(tokens, "random", "0" * 64, seed)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@functools.cache
def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=CONTEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and <bos>, <eos>, <pad>; with a chat template."""
    return copy.deepcopy(_byte_tokenizer())


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each supported ``model_type`` in turn."""
    return str(request.param)


def covering(
    name: str, values: Sequence[Any], other: str = "architecture", among: Sequence[Any] = ARCHITECTURES
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrises a test over some values and every architecture, or others: all pairs, of which most are slow.

    In the default tier value number i meets the architectures number i and i + 3, counted around (i + 1 where there are
    three), and where there are fewer values than architectures every n-th from i on. So each value is tried on two
    architectures or more, and each architecture with one value or more. Each test counts from another architecture, by
    its name, so that a pair that is slow in one is not in others.
    """
    A, n = len(among), len(values)
    step = 3 if A > 3 else 1

    def parametrised(test: Callable[..., None]) -> Callable[..., None]:
        first = zlib.crc32(test.__name__.encode()) % A
        pairs = []
        for i, value in enumerate(values):
            for a, each in enumerate(among):
                place = (a - first) % A
                fast = (place - i) % A in (0, step) or place % n == i
                pairs.append(pytest.param(value, each, marks=() if fast else pytest.mark.slow))
        decorated: Callable[..., None] = pytest.mark.parametrize((name, other), pairs)(test)
        return decorated

    return parametrised


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of an ``xdist_group`` in one process.

    pytest-xdist 3.8 appends the group's name to an attribute that pytest from 9.2 on no longer reads.
    """
    for item in items:
        grouped = getattr(item, "_nodeid", item.nodeid)
        if grouped != item.nodeid:
            item._id = type(item._id).parse(grouped)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _gguf_reader(path: str, size: int, modified: int, read: type[gguf.GGUFReader] = gguf.GGUFReader) -> gguf.GGUFReader:
    return read(path)


@pytest.fixture(scope="session", autouse=True)
def _gguf_files_are_parsed_once() -> Iterator[None]:
    """Loading a model parses its GGUF file five times, which takes the demo model's seconds each."""

    def reader(path: str | Path, mode: str = "r") -> gguf.GGUFReader:
        found = Path(path).stat()
        return _gguf_reader(str(path), found.st_size, found.st_mtime_ns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", reader)
        yield


@pytest.fixture(autouse=True)
def _gguf_files_are_forgotten() -> Iterator[None]:
    """What was parsed of a GGUF file is millions of small objects."""
    yield
    _gguf_reader.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def _the_demo_model_is_read_once() -> Iterator[None]:
    """Who loads it again gets a copy, which takes no half a minute."""
    load_gguf = sources._load_gguf
    once = functools.cache(load_gguf)

    def load(place: sources._Place, dtype: torch.dtype | None) -> sources.Loaded:
        return copy.deepcopy(once(place, dtype)) if place.kind == "demo" else load_gguf(place, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_load_gguf", load)
        yield


class Killed(Exception):
    """The process ends here."""


def killer(after: int) -> Callable[[str, int, int], None]:
    """A progress that ends the process after so many calls."""
    calls = iter(range(after))

    def progress(what: str, done: int, total: int) -> None:
        if next(calls, None) is None:
            raise Killed

    return progress
