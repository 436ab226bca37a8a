"""How good: perplexity of both sides on the same windows, and how far the candidate's predictions have moved.

Each window goes through the baseline and then the candidate once, and every number is taken from these two sets of
logits. The ratio of the perplexities is exp(mean of the differences of the windows' losses), and its interval comes
from the spread of those differences: windows that are hard for both sides do not widen it.
"""

from __future__ import annotations

from operator import sub
from statistics import fmean

from torch import Tensor

from benchmarks.intervals import exponential, exponential_of_mean
from benchmarks.measures import Quality
from compress.calibration import TokenRows
from compress.evaluate import Logits, cross_entropy, divergence, standard_error
from compress.result import Progress, no_progress


def quality(baseline: Logits, candidate: Logits, rows: TokenRows, progress: Progress = no_progress) -> Quality:
    """Measure both sides on the evaluation windows `rows`.

    Args:
        baseline: tokens (1, T) to logits (1, T, V).
        candidate: likewise, over the same vocabulary.
        rows: windows (N, T).
        progress: told of each window.
    """
    windows, predicted = len(rows.tokens), rows.predicted
    below, above, moved = [], [], []
    for done, row in enumerate(rows.tokens.unsqueeze(1), start=1):
        ours, theirs = baseline(row), candidate(row)
        below.append(cross_entropy(ours[0], row[0], predicted) / predicted)
        above.append(cross_entropy(theirs[0], row[0], predicted) / predicted)
        moved.append(divergence(_known(ours), _known(theirs), row, predicted=predicted))
        progress("quality of both", done, windows)
    differences = list(map(sub, above, below))
    baseline_perplexity, candidate_perplexity = exponential(fmean(below)), exponential(fmean(above))
    return Quality(
        baseline_perplexity=baseline_perplexity,
        candidate_perplexity=candidate_perplexity,
        baseline_standard_error=baseline_perplexity * standard_error(below),
        candidate_standard_error=candidate_perplexity * standard_error(above),
        perplexity_ratio=exponential(fmean(differences)),
        ratio_interval=exponential_of_mean(differences, "Student's t on paired window losses"),
        candidate_interval=exponential_of_mean(above, "Student's t on window losses"),
        kl=fmean(window.kl for window in moved),
        kl_standard_error=standard_error([window.kl for window in moved]),
        top1_agreement=fmean(window.top1_agreement for window in moved),
        flipped=fmean(window.flipped for window in moved),
        tokens=windows * predicted,
        baseline_window_nll=tuple(below),
        candidate_window_nll=tuple(above),
        text_sha256=rows.sha256,
    )


def _known(logits: Tensor) -> Logits:
    """Logits that have been computed, as something that can be asked for them."""
    return lambda tokens: logits
