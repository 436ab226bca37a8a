"""Methods choose on a GPU what they choose on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.sources import load
from deploy.recipe import CalibrationSpec, StepSpec
from deploy.steps import compress_model
from tests.conftest import ARCHITECTURES, byte_tokenizer, tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "2ssp": {},
    "shortgpt": {},
    "fusegpt": {"window": 4, "batch": 2, "epochs": 1, "coefficient_rank": 2, "lora_rank": 2},
    "minitron": {"cut": "depth"},
    "foldgpt": {"group": 1, "gate_steps": 2, "batch": 1, "held_out": 1, "lora_rank": 2},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "auto"])
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_gpu_makes_the_artifact_that_the_cpu_makes(model_type: str, method: str, device: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    made = {}
    for place in ("cpu", device):
        loaded = load(str(tmp_path / "dense"))
        steps = [StepSpec(method=method, set={"sparsity": 0.4, **OPTIONS[method]})]
        calibration = CalibrationSpec(rows=2, length=32)
        out = tmp_path / place
        made[place] = compress_model(
            loaded, steps, calibration, out, device=place, progress=lambda *step: None, consume=True
        )
    assert made["cpu"].layout == made[device].layout
    chosen = "attentions_removed" if method == "2ssp" else "blocks_removed"
    assert made["cpu"].steps[0].numbers[chosen] == made[device].steps[0].numbers[chosen]
