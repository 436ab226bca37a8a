"""Tensors in memory up to a limit, then in files that have no name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from compress.errors import ConfigError
from compress.lowrank import GraftedMatrix
from compress.result import Run
from compress.spill import Store


def test_what_is_above_the_limit_lies_in_a_file_without_a_name(tmp_path: Path) -> None:
    store = Store(Run(scratch=tmp_path, spill_bytes=100))
    first, second = torch.ones(20), torch.full((4, 5), 2.0)
    assert store.keep(first).data_ptr() == first.data_ptr()
    kept = store.keep(second)
    assert kept.data_ptr() != second.data_ptr()
    assert torch.equal(kept, second)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        Store(Run(scratch=tmp_path, spill_bytes=0)).room((3, 4), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_on_another_device_stays_there_and_costs_no_memory(tmp_path: Path) -> None:
    store = Store(Run(scratch=tmp_path, spill_bytes=100))
    assert store.keep(torch.empty(1000, device="meta")).device.type == "meta"
    small = torch.ones(25)
    assert store.keep(small).data_ptr() == small.data_ptr()


def test_folding_sums_in_fp32_whatever_learns() -> None:
    torch.manual_seed(0)
    matrix = GraftedMatrix(torch.randn(8, 6).bfloat16(), transposed=False, dtype=torch.bfloat16)
    matrix.add_lora(3, torch.device("cpu"), torch.Generator().manual_seed(0))
    matrix.add_donor(torch.randn(8, 6).bfloat16(), 0, 3, torch.device("cpu"), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.normal_()
    assert matrix.lora is not None
    wide = matrix.frozen.float() + matrix.lora(torch.float32)
    wide = wide + matrix.coefficients[0](torch.float32) * matrix.donors[0].float()
    assert torch.equal(matrix.folded(), wide.bfloat16())
    assert not torch.equal(matrix(), wide.bfloat16())
