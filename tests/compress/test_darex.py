"""DAREx: the moments and the closed forms against the slow reference, Monte Carlo, and numbers worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.delta import masks
from compress.delta.masks import Scheme
from compress.errors import ConfigError
from compress.methods import darex
from compress.methods.darex import DarexConfig
from tests.reference import darex as reference

MASKS = 2000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_mask(name: str, shape: tuple[int, int], config: DarexConfig) -> list[int]:
    seed = reference.tensor_seed(config.seed, name)
    if config.drawn == "one-of-m":
        return reference.one_of_m(seed, *shape, config.density.denominator)
    draw = reference.bernoulli if config.drawn == "bernoulli" else reference.columns
    return draw(seed, *shape, config.density.numerator, config.density.denominator)


# --- Dropping and rescaling


def models(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and a fine-tune: two matrices, a norm, a head that the base lacks, and a matrix that grew."""
    base = {"a": 0.2 * normal(13, 37), "b": 0.2 * normal(8, 20, seed=1), "norm": normal(7), "grown": normal(5, 6)}
    tuned = {name: tensor + 0.01 * normal(*tensor.shape, seed=9) for name, tensor in base.items()}
    tuned |= {"head": normal(2, 7), "grown": normal(6, 6, seed=3)}
    return tuple({k: v.to(dtype) for k, v in each.items()} for each in (base, tuned))


@pytest.mark.parametrize(("p", "scheme"), [("9/10", None), (0.95, "bernoulli"), ("17/20", None), (0.5, "columns")])
def test_q_of_one_less_p_is_dare_bit_for_bit(p: float | str, scheme: Scheme | None) -> None:
    base, tuned = models()
    dare = DarexConfig(p=p, scheme=scheme, rescale="dare", seed=3)
    fixed = DarexConfig(p=p, scheme=scheme, rescale="fixed", q=float(dare.density), seed=3)
    merged = darex.merge(base, tuned, dare)
    for name, tensor in darex.merge(base, tuned, fixed).items():
        assert torch.equal(tensor, merged[name])
    for name in ("a", "b"):
        delta = (tuned[name] - base[name]).double().numpy()
        kept = reference_mask(name, delta.shape, dare)
        expected = base[name].numpy() + reference.pruned(delta, kept, float(dare.density))
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.9, 0.95, 0.99, 0.7])
def test_q_may_be_given_as_one_less_p_in_floating_point(p: float) -> None:
    assert DarexConfig(p=p, rescale="fixed", q=1 - p).q == pytest.approx(1 - p)


def test_nothing_dropped_is_the_fine_tune_exactly() -> None:
    base, tuned = models(torch.bfloat16)
    for rescale in ("dare", "none"):
        for name, tensor in darex.merge(base, tuned, DarexConfig(p=0, rescale=rescale)).items():
            assert torch.equal(tensor, tuned[name])
            assert tensor.dtype == torch.bfloat16


def test_what_is_no_matrix_of_both_is_taken_as_it_is() -> None:
    base, tuned = models()
    merged = darex.merge(base, tuned, DarexConfig(p=0.9, rescale="dare"))
    assert list(merged) == list(tuned)
    for name in ("norm", "head", "grown"):
        assert torch.equal(merged[name], tuned[name])
    for name in ("a", "b"):
        assert not torch.equal(merged[name], tuned[name])


def test_merging_takes_the_factor_that_the_inputs_call_for() -> None:
    base, tuned = models()
    inputs = {"a": normal(50, 37, seed=4), "b": normal(50, 20, seed=5)}
    merged = darex.merge(base, tuned, DarexConfig(p=0.8, rescale="least-squares", per_row=False), inputs)
    for name, x in inputs.items():
        delta = (tuned[name] - base[name]).double().numpy()
        kept = reference_mask(name, delta.shape, DarexConfig(p=0.8))
        factor = reference.least_squares_layer(delta, reference.pruned(delta, kept, 1.0), x.numpy())
        expected = base[name].numpy() + reference.pruned(delta, kept, 1 / factor)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-4, atol=1e-6)


# --- Moments (A.1-1)


def changes(c: np.ndarray, scheme: Scheme, density: Fraction, q: float) -> np.ndarray:
    """h of 2,000 masks, of as many seeds."""
    kept = np.zeros((MASKS, len(c)))
    for seed in range(MASKS):
        kept[seed, masks.random_index(scheme, density, seed, "c", (1, len(c))).numpy()] = 1
    return c.sum() - kept @ c / q


def assert_within(samples: np.ndarray, mean: float, variance: float, errors: float) -> None:
    """Mean and variance of samples, within so many standard errors."""
    spread = samples.var()
    fourth = ((samples - samples.mean()) ** 4).mean()
    assert abs(samples.mean() - mean) <= errors * math.sqrt(spread / len(samples))
    assert abs(spread - variance) <= errors * math.sqrt((fourth - spread**2) / len(samples))


@pytest.mark.parametrize(("p", "q"), [("1/2", 0.5), ("9/10", 0.1), ("9/10", 0.35), ("17/20", 1.0)])
def test_bias_and_variance_over_masks_are_those_of_the_paper(p: str, q: float) -> None:
    c = normal(24, seed=8).double().numpy() + 0.3
    dropped = float(Fraction(p))
    h = changes(c, "bernoulli", 1 - Fraction(p), q)
    assert_within(h, reference.bias(c, dropped, q), reference.variance(c, dropped, q), errors=3)
    assert np.mean(h**2) == pytest.approx(reference.mean_square(c, dropped, q), rel=0.15)


@pytest.mark.parametrize("m", [2, 10])
@pytest.mark.parametrize("q", [0.1, 0.5])
def test_one_of_m_has_the_same_bias_and_the_variance_of_its_buckets(m: int, q: float) -> None:
    """26 columns: the last bucket of ten is short, and keeps none in four of ten masks."""
    c = normal(26, seed=8).double().numpy() + 0.3
    buckets = [c[start : start + m] for start in range(0, len(c), m)]
    variance = sum((each**2).sum() / m - (each.sum() / m) ** 2 for each in buckets) / q**2
    h = changes(c, "one-of-m", Fraction(1, m), q)
    assert_within(h, reference.bias(c, 1 - 1 / m, q), variance, errors=3)


def test_one_of_m_keeps_every_element_with_the_same_probability() -> None:
    m, cols = 10, 26
    counts = np.zeros(cols)
    for seed in range(MASKS):
        counts[masks.random_index("one-of-m", Fraction(1, m), seed, "c", (1, cols)).numpy()] += 1
    assert np.abs(counts - MASKS / m).max() <= 4 * math.sqrt(MASKS / m * (1 - 1 / m))


# --- The q of least mean square (A.1-5)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_the_analytic_q_is_where_the_exact_mean_square_is_smallest(p: float) -> None:
    delta, inputs = normal(3, 8, seed=2) + 1, normal(4, 8, seed=3) + 1
    influences = [row * x for x in inputs.double().numpy() for row in delta.double().numpy()]
    grid = np.linspace(1 - p, 1, 1501)
    costs = [sum(reference.mean_square(c, p, q) for c in influences) for q in grid]
    found = darex.analytic_q(delta, inputs, p)
    assert 1 - p < found < 1
    assert found == pytest.approx(grid[int(np.argmin(costs))], abs=grid[1] - grid[0])
    expected, ratio = reference.analytic_q(delta.numpy(), inputs.numpy(), p)
    assert found == pytest.approx(expected, rel=1e-5)
    assert darex.influence_ratio(delta, inputs) == pytest.approx(ratio, rel=1e-5)


def test_the_analytic_q_is_that_of_dare_where_all_influences_pull_together() -> None:
    assert darex.influence_ratio(torch.ones(2, 4000), torch.ones(3, 4000)) == pytest.approx(1 / 4000)
    assert darex.analytic_q(torch.ones(2, 4000), torch.ones(3, 4000), 0.9) == pytest.approx(0.1, abs=1e-3)


def test_the_analytic_q_is_close_to_1_where_influences_are_independent() -> None:
    delta, inputs = normal(64, 256), normal(200, 256, seed=1)
    assert darex.influence_ratio(delta, inputs) == pytest.approx(1, rel=0.05)
    assert darex.analytic_q(delta, inputs, 0.9) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("second", [-0.9, -1.0])
def test_the_analytic_q_is_at_most_1(second: float) -> None:
    """Influences that cancel have a ratio of 181, or of infinity."""
    delta, inputs = torch.tensor([[1.0, second]]), torch.ones(1, 2)
    assert darex.influence_ratio(delta, inputs) > 100
    assert darex.analytic_q(delta, inputs, 0.9) == 1 == reference.analytic_q(delta, inputs, 0.9)[0]


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_a_delta_or_inputs_of_zeros_have_a_q_as_well(p: float) -> None:
    for delta, inputs in ((torch.zeros(2, 3), normal(4, 3)), (normal(2, 3), torch.zeros(4, 3))):
        assert darex.analytic_q(delta, inputs, p) == reference.analytic_q(delta, inputs, p)[0] == pytest.approx(1)


def test_without_dropping_the_analytic_q_is_1() -> None:
    assert darex.analytic_q(torch.ones(2, 40), torch.ones(3, 40), 0.0) == 1


# --- The paper's bound (A.2.5)


def test_the_bound_of_a_2_by_3_example_is_solved_by_hand() -> None:
    """p = 0.9, eta = 0.5, mean inputs (-1, 2, -4).

    The influences times eta are (-4, -4, -4) in the first row, S = -12 and Q = 48, and (1, 1, 1) in the second, S = 3
    and Q = 3. phi(0.9) is -0.8 / ln(1/9) = 0.36410, and the constant is ln 40 = 3.68888. With u = 1/q

        r_1 = |-12 (1 - u/10) + 0.36410 * 48/4 u^2 + 3.68888| = |4.36916 u^2 + 1.2 u - 8.31112|
        r_2 = |  3 (1 - u/10) + 0.36410 *  3/4 u^2 + 3.68888| = |0.27307 u^2 - 0.3 u + 6.68888|

    r_1 is zero at u = (-1.2 + sqrt(1.44 + 145.251)) / 8.73832 = 1.24871, q = 0.80083: of the grid, 0.801. r_2 falls as
    u falls to 0.549, beyond q = 1: of the grid, the last, 0.998. Half of the rows has stopped at 0.802, which is not
    yet 0.8 of them.
    """
    delta, mean_inputs = torch.tensor([[8.0, -4.0, 2.0], [-2.0, 1.0, -0.5]]), torch.tensor([-1.0, 2.0, -4.0])
    assert darex.phi(0.9) == pytest.approx(0.36410, abs=5e-6)
    assert darex.bound_q(delta[:1], mean_inputs, 0.9, 0.5) == pytest.approx(0.801)
    assert darex.bound_q(delta[1:], mean_inputs, 0.9, 0.5) == pytest.approx(0.998)
    assert darex.bound_q(delta, mean_inputs, 0.9, 0.5) == pytest.approx((0.801 + 0.998) / 2)
    assert reference.bound_q_rows(delta, mean_inputs, 0.9, 0.5) == pytest.approx([0.801, 0.998])


def test_the_scan_of_the_bound_ends_when_enough_rows_have_stopped() -> None:
    """The example above: where half of the rows is enough, the second row gets no further than the first one's end."""
    delta, mean_inputs = torch.tensor([[8.0, -4.0, 2.0], [-2.0, 1.0, -0.5]]), torch.tensor([-1.0, 2.0, -4.0])
    found = darex.bound_q(delta, mean_inputs, 0.9, 0.5, stop_share=0.5)
    assert found == pytest.approx((0.801 + 0.802) / 2)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_the_bound_is_solved_as_the_reference_does(p: float, eta: float) -> None:
    delta, mean_inputs, bias = 3 * normal(6, 5, seed=11), normal(5, seed=12), 4 * normal(6, seed=13)
    for options in ({}, {"bias_delta": bias}, {"stop_share": 0.3}, {"stop_share": 1.0, "bias_delta": bias}):
        expected = reference.bound_q(delta, mean_inputs, p, eta, **options)
        assert darex.bound_q(delta, mean_inputs, p, eta, **options) == pytest.approx(expected, abs=1e-9)
    sure = darex.bound_q(delta, mean_inputs, p, eta, certainty=0.5)
    assert sure == pytest.approx(reference.bound_q(delta, mean_inputs, p, eta, prob=0.5), abs=1e-9)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.5 + 1e-9, 0.9, 0.95, 0.99, 0.999, 1.0])
def test_phi_is_that_of_the_reference(p: float) -> None:
    assert darex.phi(p) == pytest.approx(reference.phi(p), rel=1e-6)


def test_factors_are_one_over_the_q_that_was_asked_for() -> None:
    delta, inputs, bias = normal(6, 40) + 0.2, normal(30, 40, seed=1) + 0.2, normal(6, seed=2)
    expected = {
        "dare": 1 / 0.05,
        "none": 1.0,
        "fixed": 1 / 0.2,
        "paper-bound": 1 / reference.bound_q(delta, inputs.mean(0), 0.95, 0.4, bias_delta=bias),
        "analytic-mse": 1 / reference.analytic_q(delta, inputs, 0.95)[0],
    }
    for rescale, factor in expected.items():
        options: dict[str, Any] = {"fixed": {"q": 0.2}, "paper-bound": {"eta": 0.4}}.get(rescale, {})
        config = DarexConfig(rescale=rescale, **options)
        found = darex.factors(delta, delta, config, inputs, bias)
        assert found.shape == (1,)
        assert found.item() == pytest.approx(factor, rel=1e-5)


# --- Least squares for the drawn mask (A.1-6)


def kept_of(delta: Tensor, p: float) -> Tensor:
    index = darex.kept_index("name", delta, DarexConfig(p=p))
    return darex.scattered(index, delta.flatten()[index], delta.shape)


@pytest.mark.parametrize("tokens", [3, 100])
def test_least_squares_factors_are_those_of_the_reference(tokens: int) -> None:
    delta, inputs = normal(7, 20) + 0.1, normal(tokens, 20, seed=1) + 0.1
    kept = kept_of(delta, 0.8)
    kept[2] = 0
    layer = darex.least_squares(delta, kept, inputs, per_row=False)
    assert layer.shape == (1,)
    assert layer.item() == pytest.approx(reference.least_squares_layer(delta, kept, inputs), rel=1e-5)
    rows = darex.least_squares(delta, kept, inputs, per_row=True)
    expected = reference.least_squares_rows(delta, kept, inputs, w=darex.SHRINKAGE_TOKENS / tokens)
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-4)
    assert rows[2].item() == pytest.approx(layer.item())


def test_no_other_factor_brings_the_outputs_closer() -> None:
    delta, inputs = (normal(7, 20) + 0.1).double(), (normal(4000, 20, seed=1) + 0.1).double()
    kept = kept_of(delta.float(), 0.8).double()

    def error(factor: Tensor) -> Tensor:
        return ((delta - factor[:, None] * kept) @ inputs.T).square().sum(1)

    layer = darex.least_squares(delta.float(), kept.float(), inputs.float(), per_row=False).double()
    for change in (0.99, 1.01):
        assert error(layer).sum() < error(change * layer).sum()
    rows = darex.least_squares(delta.float(), kept.float(), inputs.float(), per_row=True).double()
    assert error(rows).sum() < error(layer).sum()
    for change in (0.9, 1.1):  # with so many tokens hardly anything is drawn to the factor of the matrix
        assert (error(rows) < error(change * rows)).all()


def test_rows_have_the_factor_of_the_matrix_where_few_tokens_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, inputs = normal(7, 20) + 0.1, normal(50, 20, seed=1)
    kept = kept_of(delta, 0.8)
    layer = darex.least_squares(delta, kept, inputs, per_row=False)
    spread = []
    for tokens in (0, 16, 1_000_000):
        monkeypatch.setattr(darex, "SHRINKAGE_TOKENS", tokens)
        spread.append(float((darex.least_squares(delta, kept, inputs, per_row=True) - layer).abs().max()))
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] == pytest.approx(0, abs=1e-3)


def test_what_has_no_effect_has_a_factor_of_zero() -> None:
    delta, inputs = normal(3, 4), normal(5, 4, seed=1)
    for per_row in (True, False):
        found = darex.least_squares(delta, torch.zeros(3, 4), inputs, per_row=per_row)
        assert not found.any()


def test_all_kept_has_a_factor_of_one() -> None:
    delta, inputs = normal(3, 4), normal(50, 4, seed=1)
    for per_row in (True, False):
        found = darex.least_squares(delta, delta, inputs, per_row=per_row)
        assert torch.allclose(found, torch.ones(()))


# --- What stays by importance (A.2.10)


@pytest.mark.parametrize("p", ["1/2", "9/10", "17/20", "0"])
def test_the_largest_stay_as_in_the_reference(p: str) -> None:
    delta, inputs = normal(9, 30).round(decimals=1), normal(12, 30, seed=1)
    magnitude = darex.kept_index("x", delta, DarexConfig(p=p, keep="magnitude", rescale="none"))
    assert magnitude.tolist() == reference.magnitude_tensor(delta, Fraction(p))
    wanda = darex.kept_index("x", delta, DarexConfig(p=p, keep="wanda", rescale="none"), inputs)
    assert set(np.bincount(wanda.numpy() // 30, minlength=9)) == {reference.keep_count(Fraction(p), 30)}
    assert wanda.tolist() == reference.wanda(delta, inputs, Fraction(p))
    assert darex.largest(delta.abs(), 1 - Fraction(p)).tolist() == reference.magnitude_rows(delta, Fraction(p))


def test_an_input_that_is_never_on_is_dropped_first() -> None:
    delta, inputs = normal(9, 30), normal(12, 30, seed=1)
    delta[:, 4], inputs[:, 4] = 100.0, 0.0
    index = darex.kept_index("x", delta, DarexConfig(p="1/2", keep="wanda", rescale="none"), inputs)
    assert 4 not in (index % 30).tolist()


def test_masks_are_drawn_by_name_seed_and_scheme() -> None:
    delta = normal(20, 60)
    drawn = set()
    for name, seed, scheme in (
        ("a", 0, None),
        ("b", 0, None),
        ("a", 1, None),
        ("a", 0, "bernoulli"),
        ("a", 0, "columns"),
    ):
        config = DarexConfig(p="3/4", rescale="dare", seed=seed, scheme=scheme)
        index = darex.kept_index(name, delta, config)
        assert index.tolist() == reference_mask(name, (20, 60), config)
        drawn.add(masks.checksum(index))
    assert len(drawn) == 5
    columns = darex.kept_index("a", delta, DarexConfig(p="3/4", rescale="dare", scheme="columns"))
    assert torch.equal(columns.view(20, -1) % 60, (columns.view(20, -1)[:1] % 60).expand(20, -1))


@pytest.mark.parametrize(
    ("p", "drawn"),
    [(0.95, "one-of-m"), ("19/20", "one-of-m"), (0.99, "one-of-m"), (0.85, "bernoulli"), (0, "one-of-m")],
)
def test_one_of_m_is_drawn_where_the_density_allows_it(p: float | str, drawn: str) -> None:
    config = DarexConfig(p=p)
    assert config.density == 1 - Fraction(str(p))
    assert config.drawn == drawn


# --- LoRA (A.2.8)


def test_pruned_factors_of_a_lora_have_the_whole_product_on_average() -> None:
    down, up, p = normal(4, 6), normal(5, 4, seed=1), Fraction(1, 2)
    q = float((1 - p) ** 2)
    products = np.zeros((MASKS, 5, 6))
    for seed in range(MASKS):
        pruned_down, pruned_up = darex.prune_lora("layer", down, up, str(p), q, seed)
        products[seed] = (pruned_up @ pruned_down).numpy()
    errors = products.std(0) / math.sqrt(MASKS)
    assert (np.abs(products.mean(0) - reference.lora_delta(down, up)) <= 4 * errors).all()


def test_factors_of_a_lora_are_pruned_as_in_the_reference() -> None:
    down, up = normal(4, 20), normal(30, 4, seed=1)
    pruned_down, pruned_up = darex.prune_lora("layer", down, up, "1/2", 0.3, seed=5)
    config = DarexConfig(p="1/2", rescale="none", seed=5)
    kept = [reference_mask(f"layer.lora_{f}", tuple(x.shape), config) for f, x in (("A", down), ("B", up))]
    for ours, theirs in zip((pruned_down, pruned_up), reference.lora_factors(down, up, *kept, 0.3), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)
    np.testing.assert_allclose(
        darex.lora_delta(down, up, 2.0).numpy(), reference.lora_delta(down, up, 2.0), rtol=1e-5, atol=1e-5
    )


# --- The search (A.2.3), and what it keeps small


@pytest.mark.parametrize("peak", [0.01, 0.0321, 0.2, 0.9, 1.0])
def test_the_search_finds_the_peak_of_a_smooth_function(peak: float) -> None:
    asked = []

    def score(q: float) -> float:
        asked.append(q)
        return -((math.log(q) - math.log(peak)) ** 2)

    found = darex.search(score, 0.01, 1.0)
    step = math.log(100) / 11 * 2 / 7  # of the finer grid
    assert abs(math.log(found / peak)) <= 0.5 * step + 1e-9
    assert len(asked) == len(set(asked)) <= 18
    assert all(0.01 <= q <= 1 for q in asked)


def test_a_search_between_equal_bounds_asks_nothing() -> None:
    assert darex.search(lambda q: pytest.fail("asked"), 1.0, 1.0) == 1


def test_the_output_change_is_of_the_logits_that_the_fine_tune_holds_highest() -> None:
    reference_logits = torch.tensor([[[5.0, 1.0, 4.0, 0.0], [0.0, 9.0, 8.0, 7.0]]])
    changed = reference_logits.clone()
    assert darex.output_change(reference_logits, changed, top=2) == 0
    changed[0, 0, 1] = 100.0  # not among the two highest
    assert darex.output_change(reference_logits, changed, top=2) == 0
    changed[0, 0, 2] += 2.0
    assert darex.output_change(reference_logits, changed, top=2) == pytest.approx(4 / 4)


# --- What is refused


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, "1", "3/2", "1/0", "much", float("nan"), float("inf")])
def test_a_share_that_cannot_be_dropped_is_refused(p: Any) -> None:
    with pytest.raises(ConfigError, match="p="):
        DarexConfig(p=p)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"keep": "best"}, "best"),
        ({"rescale": "twice"}, "twice"),
        ({"scheme": "dice"}, "dice"),
        ({"p": "17/20", "scheme": "one-of-m"}, "3/20"),
        ({"keep": "magnitude", "scheme": "bernoulli", "rescale": "none"}, "keep=random"),
        ({"rescale": "fixed"}, "fixed"),
        ({"rescale": "dare", "q": 0.5}, "fixed"),
        ({"p": 0.9, "rescale": "fixed", "q": 0.05}, "0.05"),
        ({"p": 0.9, "rescale": "fixed", "q": 1.5}, "1.5"),
        ({"p": 0.9, "rescale": "fixed", "q": math.nan}, "nan"),
        ({"keep": "magnitude", "rescale": "dare"}, "dare"),
        ({"keep": "wanda", "rescale": "paper-bound"}, "paper-bound"),
        ({"keep": "magnitude", "rescale": "analytic-mse"}, "analytic-mse"),
        ({"rescale": "paper-bound", "eta": 0.0}, "eta"),
        ({"rescale": "paper-bound", "eta": -1.0}, "eta"),
    ],
)
def test_options_that_cannot_be_meant_together_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        DarexConfig(**options)


@pytest.mark.parametrize("rescale", ["least-squares", "paper-bound", "analytic-mse"])
def test_a_factor_of_inputs_that_were_not_given_is_refused(rescale: Any) -> None:
    config = DarexConfig(rescale=rescale, eta=0.5)
    assert config.needs_inputs
    with pytest.raises(ConfigError, match="calibrate"):
        darex.factors(normal(2, 3), normal(2, 3), config)


def test_wanda_without_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        darex.kept_index("x", normal(2, 30), DarexConfig(keep="wanda", rescale="none"))


@pytest.mark.parametrize("rescale", ["search", "paper-bound"])
def test_a_search_that_was_not_made_is_refused(rescale: Any) -> None:
    with pytest.raises(ConfigError, match="searched"):
        darex.factors(normal(2, 3), normal(2, 3), DarexConfig(rescale=rescale), normal(4, 3))
