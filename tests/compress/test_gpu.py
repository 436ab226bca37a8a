"""Methods choose on a GPU what they choose on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.sources import load
from deploy.recipe import CalibrationSpec
from deploy.steps import compress_model
from tests.conftest import ARCHITECTURES, byte_tokenizer, tiny


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["2ssp", "shortgpt"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_gpu_makes_the_artifact_that_the_cpu_makes(model_type: str, method: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    made = {}
    for device in ("cpu", "cuda"):
        loaded = load(str(tmp_path / "dense"))
        steps = [(method, {"sparsity": 0.4})]
        calibration = CalibrationSpec(rows=2, length=32)
        out = tmp_path / device
        made[device] = compress_model(
            loaded, steps, calibration, out, device=device, progress=lambda *step: None, consume=True
        )
    assert made["cpu"].layout == made["cuda"].layout
    chosen = "attentions_removed" if method == "2ssp" else "blocks_removed"
    assert made["cpu"].steps[0].numbers[chosen] == made["cuda"].steps[0].numbers[chosen]
