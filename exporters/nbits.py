"""Matrices in 4 or 8 bits, in blocks along their inputs that share a scale, as MatMulNBits reads them.

The numbers come from onnxruntime's own quantisers; what is done here is to call them for one matrix, a few rows at a
time where they take many times a matrix's memory, and to bring their results into one form.

* ``rtn``: round to nearest, symmetric: no zero points.
* ``k-quant``: scale and zero point of each block by a search for the least weighted error, as llama.cpp's K-quants.
* ``hqq``: zero points from half-quadratic optimisation (Badri and Shaji 2023), rounded to integers here: with the
  fractions that onnxruntime's tool writes its kernels cannot compute in int8, and decode several times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import require

SLICE = 1 << 20
"""Weights that a quantiser written in numpy or torch sees at once; it takes about ten times their memory."""


@dataclass(frozen=True)
class Blocks:
    """A matrix (N outputs, K inputs) in B = ceil(K / block_size) blocks per output; the last is padded with zeros.

    Attributes:
        codes: uint8 (N, B, block_size * bits / 8), the first weight in the lowest bits.
        scales: float16 (N, B). What rounding them adds is less than what rounding weights to codes does, unless all
            weights of a block are below 0.001 (8 bits).
        zero_points: uint8 (N, ceil(B * bits / 8)), packed alike; None: 2 ** (bits - 1) everywhere.
        bits: 4 or 8.
        block_size: weights that share a scale.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None
    bits: int
    block_size: int

    def dequantised(self, inputs: int) -> Tensor:
        """The matrix that these blocks stand for, float32 (N, inputs)."""
        rows, count = self.scales.shape
        codes = _unpack(self.codes.reshape(rows, -1), self.bits).reshape(rows, count, self.block_size)
        zeros = np.full((rows, count), 2 ** (self.bits - 1), np.uint8)
        if self.zero_points is not None:
            zeros = _unpack(self.zero_points, self.bits)[:, :count]
        values = (codes.astype(np.float32) - zeros[:, :, None]) * self.scales[:, :, None].astype(np.float32)
        return torch.from_numpy(values.reshape(rows, -1)[:, :inputs].copy())


def quantise(weight: Tensor, bits: int, block_size: int, algorithm: str) -> Blocks:
    """Quantise a matrix (N, K) of any float dtype.

    Args:
        weight: outputs by inputs, as a linear has it.
        bits: 4 or 8.
        block_size: a power of two from 16 on.
        algorithm: one of ``base.ALGORITHMS``.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    if algorithm == "rtn":
        return _rtn(weight, bits, block_size)
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % block_size))
    find = {"k-quant": _k_quant, "hqq": _hqq}[algorithm]
    parts = [find(rows, bits, block_size) for rows in torch.split(padded, max(1, SLICE // padded.shape[1]))]
    codes, scales, zeros = (np.concatenate(each) for each in zip(*parts, strict=True))
    count = scales.shape[1]
    return Blocks(
        codes=_pack(codes, bits).reshape(len(codes), count, -1),
        scales=scales.astype(np.float16),
        zero_points=_pack(zeros, bits),
        bits=bits,
        block_size=block_size,
    )


def join(parts: Sequence[Blocks]) -> Blocks:
    """Matrices of the same inputs as one, output after output."""
    first = parts[0]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return replace(
        first,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zeros) if zeros else None,
    )


def _rtn(weight: Tensor, bits: int, block_size: int) -> Blocks:
    tools = _tools()
    config = tools.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    matrix = weight.float().T.contiguous().numpy()
    codes, scales, _ = tools.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return Blocks(codes, scales.astype(np.float16), None, bits, block_size)


Found = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]
"""Of rows: a code for each weight (R, K), scales (R, B), a zero point for each block (R, B)."""


def _k_quant(rows: Tensor, bits: int, block_size: int) -> Found:
    tool: Any = require("onnxruntime.quantization.neural_compressor.weight_only", "onnx")
    with np.errstate(all="ignore"):  # blocks of equal weights divide by zero on the way, and are not taken
        codes, scales, zeros = tool.quant_tensor_k_quant_cpu(rows.numpy(), bits, block_size)
    groups, top = rows.reshape(-1, block_size).numpy(), 2**bits - 1
    least, most = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    one_sided = ((least > 0) | (most < 0))[:, 0]  # the tool forgets that 0 must lie between least and most
    if one_sided.any():
        width = (np.maximum(most, 0) - np.minimum(least, 0))[one_sided]
        scales[one_sided] = width / top
        zeros[one_sided] = np.where(most < 0, top, 0)[one_sided]
        codes[one_sided] = (groups[one_sided] * top / width + zeros[one_sided]).round().clip(0, top)
    count = rows.shape[1] // block_size
    return (
        codes.astype(np.uint8).reshape(rows.shape),
        scales.astype(np.float32).reshape(-1, count),
        zeros.astype(np.uint8).reshape(-1, count),
    )


def _hqq(rows: Tensor, bits: int, block_size: int) -> Found:
    top = 2**bits - 1
    groups = rows.reshape(-1, block_size)
    least, most = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    per_scale = top / torch.where(most > least, most - least, 1.0)
    _, zeros = _tools().HQQWeightOnlyQuantizer.optimize_weights(groups, per_scale, -least * per_scale, [0, top], axis=1)
    zeros = zeros.round().clamp(0, top)
    codes = (groups * per_scale + zeros).round().clamp(0, top)
    count = rows.shape[1] // block_size
    return (
        codes.to(torch.uint8).numpy().reshape(rows.shape),
        (1 / per_scale).numpy().reshape(-1, count),
        zeros.to(torch.uint8).numpy().reshape(-1, count),
    )


def _tools() -> ModuleType:
    return require("onnxruntime.quantization.matmul_nbits_quantizer", "onnx")


def _pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers (R, C) of so many bits, side by side in bytes (R, ceil(C * bits / 8))."""
    if bits == 8:
        return numbers
    numbers = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
    return np.bitwise_or(numbers[:, ::2], np.left_shift(numbers[:, 1::2], 4, dtype=np.uint8))


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """What `_pack` was given, and the padding."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
