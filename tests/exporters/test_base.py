"""Options, the record of an export, and what is refused before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import ArtifactError, ConfigError, CorruptArtifact, ManifestVersionError, ParityError
from compress.sources import Loaded, Origin
from exporters import ExportOptions, export, is_export, read_export
from exporters.parity import Prefill, Side, check
from tests.conftest import CONTEXT, byte_tokenizer, tiny, token_rows

TOKENS = token_rows(rows=2, length=6).tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exports") / "x"
    source = Loaded(tiny("llama"), byte_tokenizer(), Origin("tiny", "folder"))
    return export(source, path, to="hf", check_tokens=TOKENS).path


@pytest.mark.parametrize("options", [{"block_size": 20}, {"accuracy_level": 5}, {"accuracy_level": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="possible are"):
        ExportOptions(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "gguff"}, "known are onnx, hf"),
        ({"to": "onnx", "options": ExportOptions(dtype="int3")}, "stores fp32 or fp16 or int8 or int4"),
        ({"to": "onnx", "check_tokens": torch.zeros(1, CONTEXT + 1, dtype=torch.int64)}, r"1\.\.64"),
        ({"to": "onnx", "check_tokens": torch.zeros(0, 5, dtype=torch.int64)}, r"1\.\.64"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = Loaded(tiny("llama"), byte_tokenizer(), Origin("tiny", "folder"))
    with pytest.raises(ConfigError, match=message):
        export(source, tmp_path / "x", **{"check_tokens": TOKENS, **changes})
    assert not list(tmp_path.iterdir())


def test_the_record_is_read_back(folder: Path) -> None:
    record = read_export(folder)
    assert (record.to, record.options.dtype, record.model_type) == ("hf", "fp32", "llama")
    assert record.parameters == sum(p.numel() for p in tiny("llama").parameters())
    assert set(record.files) == {file.name for file in folder.iterdir()} - {"export.json"}
    assert is_export(folder)


def test_a_folder_without_a_record_is_no_export(tmp_path: Path) -> None:
    assert not is_export(tmp_path)
    with pytest.raises(ArtifactError, match="not an export"):
        read_export(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 99}, ManifestVersionError),
        ({"parameters": "many"}, CorruptArtifact),
        ({"unknown": 1}, CorruptArtifact),
    ],
)
def test_a_record_of_another_shape_is_refused(
    change: dict[str, Any], error: type[Exception], folder: Path, tmp_path: Path
) -> None:
    record = json.loads((folder / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(error):
        read_export(tmp_path)


def test_a_record_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="cannot be read as JSON"):
        read_export(tmp_path)


def side(offset: float) -> Side:
    """Logits that only depend on the token, off by a constant on one of five."""

    def whole(tokens: Tensor) -> Tensor:
        logits = torch.nn.functional.one_hot(tokens % 5, 5).float()
        logits[..., 0] += offset
        return logits

    def decode(tokens: Tensor) -> Iterator[Tensor]:
        yield from whole(tokens)

    return Side(whole, decode)


def last_of(offset: float) -> Prefill:
    """A prompt read by that side."""
    return lambda row: side(offset).whole(row)[-1]


SMALL = TOKENS % 5
LIMITS = {"tolerance": 1e-3, "min_argmax_agreement": 0.9}


def test_equal_sides_have_no_distance() -> None:
    parity = check(side(0).whole, side(0), SMALL, **LIMITS)
    assert (parity.max_abs_difference, parity.decode_max_abs_difference) == (0, 0)
    assert parity.argmax_agreement == parity.decode_argmax_agreement == 1
    assert parity.tokens == parity.decode_tokens == TOKENS.numel()


@pytest.mark.parametrize(
    ("export_side", "full_precision", "message"),
    [
        (side(0.01), None, "decoding with a cache a logit is off by 0.01"),
        (Side(side(0.01).whole, side(0).decode), None, "a whole forward a logit is off by 0.01"),
        (Side(side(0).whole, side(0.01).decode), None, "decoding with a cache"),
        (side(float("nan")), None, "off by inf"),
        (side(5), side(5), "both prefer the same token at"),
        (side(0.01), Side(side(5).whole, side(0).decode), "decoding with a cache a logit is off by 5"),
        (Side(side(0).whole, side(0).decode, last_of(0.01)), None, "decoding with a cache a logit is off by 0.01"),
        (side(0), Side(side(0).whole, side(0).decode, last_of(0.01)), "decoding with a cache"),
    ],
)
def test_a_side_that_is_off_is_refused(export_side: Side, full_precision: Side | None, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        check(side(0).whole, export_side, SMALL, full_precision=full_precision, **LIMITS)


def test_quantised_weights_may_move_logits_but_not_choices() -> None:
    parity = check(side(0).whole, side(0.3), SMALL, full_precision=side(0.3), **LIMITS)
    assert parity.max_abs_difference == pytest.approx(0.3)
    assert (parity.decode_max_abs_difference, parity.decode_against) == (0, "export")


def test_divergence_and_perplexity_are_those_of_the_next_tokens() -> None:
    ours, theirs = (side(offset).whole(SMALL).log_softmax(-1) for offset in (0, 0.3))
    parity = check(side(0).whole, side(0.3), SMALL, full_precision=side(0.3), **LIMITS)
    assert parity.kl == pytest.approx(float((ours.exp() * (ours - theirs)).sum(-1).mean()), rel=1e-5)
    nats = [float(-each[:, :-1].gather(-1, SMALL[:, 1:, None]).mean()) for each in (ours, theirs)]
    assert parity.perplexity_ratio == pytest.approx(math.exp(nats[1] - nats[0]), rel=1e-5)
    with pytest.raises(ParityError, match=r"diverges from its source by .* nats per token, and max_kl=0\.001"):
        check(side(0).whole, side(0.3), SMALL, full_precision=side(0.3), max_kl=0.001, **LIMITS)
