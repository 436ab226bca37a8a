"""A record with made-up numbers that could be true, for the tests of records and reports."""

from __future__ import annotations

import math

import pytest

from benchmarks.gate import Limit, judge
from benchmarks.intervals import exponential_of_mean
from benchmarks.machine import Machine
from benchmarks.measures import Measures, Quality, compare, paired_runs
from benchmarks.record import Ladder, Model, Record, Step, Variant

BASELINE_NLL = (2.61, 2.88, 2.74, 3.02, 2.79, 2.95, 2.70, 2.83)
CANDIDATE_NLL = (2.93, 3.27, 3.08, 3.43, 3.14, 3.36, 3.05, 3.20)

LIMITS = (
    Limit(metric="perplexity", max_ratio=2.0),
    Limit(metric="size_bytes", max_ratio=0.9),
    Limit(metric="decode_tokens_per_second", min_ratio=1.15),
    Limit(metric="peak_rss_bytes", max=400_000_000),
)


def paired_quality(baseline: tuple[float, ...], candidate: tuple[float, ...]) -> Quality:
    """Quality with the perplexities that follow from the windows' losses."""
    below, above = (math.exp(math.fsum(nll) / len(nll)) for nll in (baseline, candidate))
    differences = [theirs - ours for ours, theirs in zip(baseline, candidate, strict=True)]
    return Quality(
        baseline_perplexity=below,
        candidate_perplexity=above,
        baseline_standard_error=0.79,
        candidate_standard_error=1.27,
        perplexity_ratio=above / below,
        ratio_interval=exponential_of_mean(differences, "Student's t on paired window losses"),
        candidate_interval=exponential_of_mean(candidate, "Student's t on window losses"),
        kl=0.3127,
        kl_standard_error=0.0118,
        top1_agreement=0.7341,
        tokens=16376,
        baseline_window_nll=baseline,
        candidate_window_nll=candidate,
        text_sha256="5d" * 32,
    )


@pytest.fixture
def record() -> Record:
    """A run that passes its gate."""
    quality = paired_quality(BASELINE_NLL, CANDIDATE_NLL)
    prefill = paired_runs(
        "prefill, in process", "seconds", (0.231, 0.226, 0.229, 0.240, 0.228), (0.186, 0.183, 0.190, 0.185, 0.184)
    )
    decode = paired_runs(
        "decode, in process", "tokens/second", (187.2, 191.8, 189.9, 184.1, 190.6), (231.7, 236.4, 229.3, 234.8, 233.9)
    )
    ttft = paired_runs(
        "time to first token, served",
        "seconds",
        (0.0611, 0.0643, 0.0598, 0.0702, 0.0626, 0.0619),
        (0.0517, 0.0534, 0.0509, 0.0551, 0.0528, 0.0561),
    )
    comparison = compare(
        parameters=(134_515_008, 106_384_512),
        size_bytes=(86_433_291, 68_902_117),
        peak_rss_bytes=(412_303_360, 361_758_720),
        quality=quality,
        decode=decode,
        ttft=ttft,
    )
    verdict = judge(LIMITS, comparison.baseline, comparison.candidate, comparison.intervals)
    return Record(
        kind="run",
        created="2026-11-20T09:30:00+00:00",
        title="demo:smollm2, sparsity=0.25 by 2ssp",
        model=Model("demo:smollm2", "apache-2.0", "Q4_1"),
        artifacts={"baseline": None, "candidate": "9f2c51d07ab3e684"},
        measured="int4 ONNX, on the CPU",
        baseline=comparison.baseline,
        candidate=comparison.candidate,
        ratio=comparison.ratio,
        intervals=comparison.intervals,
        verdict=verdict.verdict,
        gates=verdict.gates,
        ladder=Ladder(
            "fp32, PyTorch",
            2.0,
            (
                Step(0.0, None, 134_515_008, 0.0, 0.0, 16.41, 0.77, 1.0),
                Step(0.125, "31c9", 121_204_224, 0.1253, 0.0990, 18.92, 0.93, 1.153, None, True),
                Step(0.25, "9f2c51d07ab3e684", 106_384_512, 0.2502, 0.2091, 23.58, 1.22, 1.437, None, True, True),
                Step(0.375, "77ab", 94_621_440, 0.3749, 0.2966, 38.11, 2.31, 2.322, None, False),
            ),
        ),
        variants=(
            Variant(
                "dense, fp32 PyTorch", "baseline", "torch", "fp32", Measures(134_515_008, 538_060_032, 16.41), 0.77
            ),
            Variant("dense, int4 ONNX", "baseline", "onnx", "int4", comparison.baseline, 0.79),
            Variant("candidate, int4 ONNX", "candidate", "onnx", "int4", comparison.candidate, 1.27),
        ),
        quality={"candidate int4 against dense int4": quality},
        runs=(prefill, decode, ttft),
        recipe={
            "name": "demo",
            "model": "demo:smollm2",
            "calibration": {"source": "builtin", "rows": 24, "length": 2048, "seed": 0},
            "steps": [{"method": "2ssp", "set": {"sparsity": [0.125, 0.25, 0.375]}}],
            "gate": {"limits": [{"metric": "perplexity", "max_ratio": 2.0}]},
        },
        texts={
            "calibration": {
                "source": "builtin (calibration)",
                "sha256": "a3" * 32,
                "rows": 24,
                "length": 2048,
                "seed": 0,
            },
            "evaluation": {"source": "builtin (evaluation)", "sha256": "5d" * 32, "rows": 8, "length": 2048, "seed": 0},
        },
        commands=("foldaway run deploy/recipes/demo.yaml -o runs/demo",),
        machine=Machine(
            cpu="Example CPU 3000",
            architecture="x86_64",
            physical_cores=2,
            logical_cores=2,
            usable_cores=2,
            cpu_flags=("avx2", "avx512f", "avx512_vnni"),
            memory_bytes=25_280_000_000,
            system="Linux 6.1.0",
            python="3.11.2",
            packages={"torch": "2.13.0", "onnxruntime": "1.31.1"},
            commit="0123456789abcdef0123456789abcdef01234567",
        ),
    )
