"""Matrices in blocks of few bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.base import ALGORITHMS
from exporters.nbits import SLICE, Blocks, join, quantise

torch.manual_seed(0)
WEIGHT = torch.randn(9, 100)


def by_hand(blocks: Blocks) -> torch.Tensor:
    """Every weight by its own arithmetic: code minus zero point, times scale."""
    rows, count = blocks.scales.shape
    matrix = torch.zeros(rows, count * blocks.block_size)
    per_byte = 8 // blocks.bits
    for row in range(rows):
        for column in range(matrix.shape[1]):
            block, inside = divmod(column, blocks.block_size)
            byte = int(blocks.codes[row, block, inside // per_byte])
            code = (byte >> (blocks.bits * (inside % per_byte))) % 2**blocks.bits
            zero = 2 ** (blocks.bits - 1)
            if blocks.zero_points is not None:
                packed = int(blocks.zero_points[row, block // per_byte])
                zero = (packed >> (blocks.bits * (block % per_byte))) % 2**blocks.bits
            matrix[row, column] = (code - zero) * float(blocks.scales[row, block])
    return matrix


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_what_is_stored_stands_for_the_matrix(bits: int, algorithm: str, block_size: int) -> None:
    blocks = quantise(WEIGHT, bits, block_size, algorithm)
    count = -(-100 // block_size)
    assert blocks.codes.shape == (9, count, block_size * bits // 8)
    assert blocks.scales.shape == (9, count)
    assert blocks.scales.dtype == np.float16
    assert (blocks.zero_points is None) == (algorithm == "rtn")
    back = blocks.dequantised(100)
    torch.testing.assert_close(back, by_hand(blocks)[:, :100])
    step = torch.from_numpy(np.abs(blocks.scales)).repeat_interleave(block_size, 1)[:, :100]
    assert ((back - WEIGHT).abs() <= 1.01 * step).all()  # a clamped code is off by up to one step
    assert ((back - WEIGHT).abs() <= 0.51 * step).float().mean() > 0.9


@pytest.mark.parametrize("algorithm", ["rtn", "k-quant"])  # hqq stops by the mean error of what it sees
def test_outputs_are_quantised_each_for_itself(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise(WEIGHT, 4, 32, algorithm)
    joined = join([quantise(WEIGHT[:4], 4, 32, algorithm), quantise(WEIGHT[4:], 4, 32, algorithm)])
    assert WEIGHT.numel() < SLICE
    monkeypatch.setattr("exporters.nbits.SLICE", 256)
    for other in (joined, quantise(WEIGHT, 4, 32, algorithm)):
        assert np.array_equal(whole.codes, other.codes)
        assert np.array_equal(whole.scales, other.scales)
        assert (whole.zero_points is None) or np.array_equal(whole.zero_points, other.zero_points)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_blocks_of_equal_weights_are_no_trouble(algorithm: str, value: float) -> None:
    back = quantise(torch.full((3, 64), value), 4, 32, algorithm).dequantised(64)
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back, torch.full((3, 64), value), atol=abs(value) / 10, rtol=0)
