"""Memory of ONNX sessions: it follows what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import prepacking
from compress.errors import BackendError, ConfigError
from compress.sources import Loaded, Origin
from compress.surgery import share_blocks
from exporters import export
from tests.conftest import byte_tokenizer, token_rows

BLOCKS, SHARING = 4, 3


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 40 MB and what is left of it when all blocks share, in fp32."""
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=BLOCKS, hidden_size=384, intermediate_size=1536, num_attention_heads=6,
        num_key_value_heads=6, vocab_size=259, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("exports")
    tokens = token_rows(1, 8).tokens
    for side in ("baseline", "candidate"):
        export(Loaded(model, byte_tokenizer(), Origin("m", "folder")), folder / side, to="onnx", check_tokens=tokens)
        if side == "baseline":
            share_blocks(model, {0: range(1, 1 + SHARING)})
    return {side: folder / side for side in ("baseline", "candidate")}


def test_a_session_holds_what_is_stored_and_not_what_is_executed(exports: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    argv = [str(exports["baseline"]), str(exports["candidate"]), "--repeats", "3", "--ways", "default", "-o", str(file)]
    assert prepacking.main(argv) == 0
    record = json.loads(file.read_text())
    baseline, candidate = (record["runs"]["default"][side] for side in ("baseline", "candidate"))
    less = record["file_bytes"]["baseline"] - record["file_bytes"]["candidate"]
    assert less > 25e6
    for kind in ("loaded_anon_bytes", "used_total_bytes"):  # a copy per node would make this 0; allocators keep some
        assert min(run[kind] for run in baseline) - min(run[kind] for run in candidate) > 0.5 * less
    assert baseline[0].keys() == candidate[0].keys() >= {"idle_bytes", "peak_bytes", "decode_tokens_per_second"}


def test_a_table_has_medians_and_their_ratio(exports: dict[str, Path]) -> None:
    runs = prepacking.measure(exports, ["saved"], repeats=1)
    lines = prepacking.table(runs, {"baseline": 4_000_000, "candidate": 1_000_000}).splitlines()
    assert lines[2].startswith("| saved | baseline | 4 |")
    assert lines[4].startswith("| saved | ratio | 0.250 |")


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="config"):
        prepacking.measure({"baseline": tmp_path}, ["default"], repeats=1)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be measured: .*(NoSuchFile|NO_SUCHFILE|doesn't exist)"):
        prepacking.measure({"baseline": tmp_path}, ["default"], repeats=1)
