"""The peers that a method must beat.

ShortGPT: layers in large language models are more redundant than you expect (Men et al., 2024). A block that changes
its input little can go. Its influence is 1 - cos(input, output); the blocks with the lowest influence are removed, all
at once. No weight is updated.

Cost: one forward pass per calibration row.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_similarity
from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.errors import BudgetError, ConfigError
from compress.ranking import lowest_indices
from compress.result import CompressedModel, Report, Run
from compress.surgery import clone, drop_blocks


@dataclass(frozen=True)
class ShortGPTConfig:
    """What ShortGPT leaves to the user.

    Attributes:
        sparsity: share of the blocks to remove, in [0, 1), rounded up to whole blocks.
        tokens: where the influence is taken: "last", the last token of each row, or "all".
    """

    sparsity: float
    tokens: str = "last"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} is not a share; give one from 0 up to, not including, 1")
        if self.tokens not in ("last", "all"):
            raise ConfigError(f"tokens={self.tokens!r} is not known; give 'last' or 'all'")


def shortgpt(
    model: PreTrainedModel, calibration: TokenRows, config: ShortGPTConfig, run: Run | None = None
) -> CompressedModel:
    """Remove the blocks of the least influence. The first block is never removed.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T).
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: nothing but the first block would be left to remove.

    Source: Men et al. 2024, section 3.1 (block influence); the first block fixed as in the 2SSP comparison.
    """
    run = run or Run()
    dense = budget.count(model)
    goes = _blocks_to_remove(model, config)
    pruned = model if run.consume else clone(model)
    influence = block_influence(pruned, calibration, config, run)
    removed = sorted(lowest_indices([math.inf, *influence[1:]], goes))
    if removed:
        drop_blocks(pruned, removed)
    now = budget.count(pruned)
    numbers = {
        "blocks_removed": removed,
        "block_influence": influence,
        "parameters_before": dense.total,
        "parameters_after": now.total,
        "sparsity_wanted": config.sparsity,
        "sparsity_of_blocks": budget.sparsity(dense, now)["blocks"],
        "sparsity_of_model": budget.sparsity(dense, now)["model"],
    }
    return CompressedModel(pruned, Report("shortgpt", dataclasses.asdict(config), numbers))


def shortgpt_outline(model: PreTrainedModel, rows: int, config: ShortGPTConfig) -> float:
    """Cut ``model`` in place to the shape that `shortgpt` gives it; returns the forward passes `shortgpt` takes."""
    goes = _blocks_to_remove(model, config)
    if goes:
        drop_blocks(model, range(1, goes + 1))
    return rows


def _blocks_to_remove(model: PreTrainedModel, config: ShortGPTConfig) -> int:
    blocks = len(Decoder(model))
    # The tolerance keeps 0.3 * 30 at 9 blocks, although the product is a hair above 9 in floating point.
    goes = math.ceil(config.sparsity * blocks - 1e-9)
    if goes >= blocks:
        raise BudgetError(f"sparsity {config.sparsity} would remove all {blocks} blocks; lower the sparsity")
    return goes


def block_influence(model: PreTrainedModel, calibration: TokenRows, config: ShortGPTConfig, run: Run) -> list[float]:
    """BI_i = 1 - E[cos(input of block i, output of block i)], one per block."""
    similarity = block_similarity(Decoder(model), calibration.tokens, run, last_token_only=config.tokens == "last")
    return [1 - cosine for cosine in similarity]
