"""Tensors that may be larger than what memory has to spare: above a limit they lie in memory-mapped files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.result import Run


class Store:
    """Room for tensors on the CPU: in memory up to ``run.spill_bytes`` in all, then in files that are mapped into it.

    The files lie in ``run.scratch``, or where the system keeps temporary files. They have no name, so that nothing is
    left behind however the process ends.
    """

    def __init__(self, run: Run) -> None:
        self._folder = Path(tempfile.gettempdir()) if run.scratch is None else run.scratch
        self._left = run.spill_bytes

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to write into.

        Raises:
            ConfigError: it does not fit in memory's share, and the disk has not enough left.
        """
        size = math.prod(shape)
        taken = size * dtype.itemsize
        if taken <= self._left:
            self._left -= taken
            return torch.empty(tuple(shape), dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            try:
                # A sparse file would be believed to fit, and the process killed where it does not.
                os.posix_fallocate(file.fileno(), 0, taken)
            except OSError as error:
                raise ConfigError(
                    f"{taken:,} bytes of hidden states or weights do not fit in memory's share, nor on the disk of "
                    f"{self._folder} ({error.strerror}): give fewer or shorter calibration rows, or a larger disk"
                ) from error
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(tuple(shape))

    def keep(self, tensor: Tensor) -> Tensor:
        """Hold on to a tensor that nobody writes to: as it is while memory's share lasts, then as a copy in a file.

        What lies on a GPU stays there, where it is needed at each step.
        """
        tensor = tensor.detach()
        if tensor.device.type != "cpu":
            return tensor
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            return tensor
        return self.room(tensor.shape, tensor.dtype).copy_(tensor)
