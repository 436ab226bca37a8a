"""Compressing must not hold a second copy of the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.memory import peak_rss_of

PARAMETERS = 974_206_976
COMPRESS = """
import sys
from pathlib import Path

import torch
from compress.artifact import OriginEntry, Step, save
from compress.methods import two_ssp
from compress.result import Run
from tests.conftest import byte_tokenizer, token_rows
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(vocab_size=259, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                     num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=128)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
assert sum(p.numel() for p in model.parameters()) == int(sys.argv[2])
made = two_ssp.compress(model, token_rows(2, 64), two_ssp.TwoSSPConfig(sparsity=0.25), Run(consume=True))
step = Step(method="2ssp", config=dict(made.report.config), numbers=dict(made.report.numbers))
save(made.model, byte_tokenizer(), Path(sys.argv[1]), origin=OriginEntry(name="random", kind="folder"), steps=[step])
"""


@pytest.mark.slow
def test_compressing_a_billion_parameters_peaks_at_their_size_and_a_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))

    peak = peak_rss_of([sys.executable, "-c", COMPRESS, str(tmp_path / "smaller"), str(PARAMETERS)])

    weights = 2 * PARAMETERS
    assert peak <= 1.15 * weights + 1e9, f"{peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights"
    print(f"peak {peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights")
