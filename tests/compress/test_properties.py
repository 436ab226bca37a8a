"""What must hold for every method on every architecture: properties 1 to 8 of a compressed model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils

from compress import artifact, budget
from compress.decoder import Decoder
from compress.errors import ConfigError, FoldawayError
from compress.evaluate import logits_of
from compress.layout import layout_of
from compress.methods import METHODS, method_config
from compress.remote_code import FoldawayForCausalLM, base_config
from compress.result import CompressedModel, Run
from compress.sources import load
from compress.surgery import clone, drop_attention, drop_blocks
from tests.conftest import _COMMON, ARCHITECTURES, CONTEXT, TINY, D, byte_tokenizer, tiny, token_rows
from tests.reference.two_ssp import Reference

OPTIONS: dict[str, dict[str, Any]] = {"2ssp": {"sparsity": 0.5, "alpha": 1.0}, "shortgpt": {"sparsity": 0.3}}
# For each field of a method's configuration: another value that can be meant, and values that cannot.
CHANGES: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    "2ssp": {
        "sparsity": (0.3, [1.2, 1, -0.1, float("nan"), "half", None]),
        "alpha": (0.6, [0, -1.5, float("nan"), "much"]),
        "neuron_norm": ("l1", ["l3", "", None]),
        "divisor": (8, [0, -64, 1.5, "64"]),
    },
    "shortgpt": {"sparsity": (0.5, [1.2, 1, -0.1, float("nan"), "half", None]), "tokens": ("all", ["first", 1])},
}
ROWS = token_rows(3, 24)
TOKENS = token_rows(2, 40, seed=1).tokens  # beyond gemma3's window of 8

# Models that keep only some of what they see in their caches, in ways the plain tiny models do not.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(method: str, model: PreTrainedModel, run: Run | None = None, **options: Any) -> CompressedModel:
    return METHODS[method].compress(model, ROWS, method_config(method, {**OPTIONS[method], **options}), run)


@functools.cache
def _compressed(method: str, model_type: str) -> CompressedModel:
    return run(method, tiny(model_type))


def compressed(method: str, model_type: str) -> CompressedModel:
    """The result with the default options; a clone, because saving a model writes into its config."""
    result = _compressed(method, model_type)
    return CompressedModel(clone(result.model), result.report)


def windowed(model_type: str) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**_COMMON, **TINY[model_type], **WINDOWED[model_type]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return logits_of(model)(tokens)


def fingerprint(model: PreTrainedModel) -> str:
    """Everything that an edit could change in place: weights, buffers, config, classes, cache numbers, modes."""
    digest = hashlib.sha256(repr(type(model)).encode())
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, module in model.named_modules():
        numbers = [getattr(module, key, None) for key in ("layer_idx", "in_features", "out_features", "nf", "nx")]
        state = (name, type(module).__name__, module.training, numbers, len(module._forward_hooks))
        digest.update(repr((state, len(module._forward_pre_hooks))).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(result: CompressedModel, path: Path) -> artifact.Manifest:
    step = artifact.Step(
        method=result.report.method,
        config=dict(result.report.config),
        calibration=ROWS.record(),
        numbers=dict(result.report.numbers),
    )
    origin = artifact.OriginEntry(name="tiny", kind="folder")
    return artifact.save(result.model, byte_tokenizer(), path, origin=origin, steps=[step])


def decode(model: PreTrainedModel, tokens: torch.Tensor, prompt: int = 1) -> torch.Tensor:
    """Logits of a prefill of `prompt` tokens and then one token at a time, with the model's own cache."""
    cache, parts, start = None, [], 0
    with torch.no_grad():
        for end in range(prompt, tokens.shape[1] + 1):
            output = model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, end
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


# 1. masked = sliced


def test_cutting_neurons_and_attentions_is_zeroing_them(architecture: str) -> None:
    model = tiny(architecture).double()
    masked = Reference(model)
    result = METHODS["2ssp"].compress(model, ROWS, method_config("2ssp", OPTIONS["2ssp"]))
    for block, now in zip(masked.blocks, Decoder(result.model), strict=True):
        kept = columns_kept(block.get_submodule(masked.names.last), now.ffn_out.module)
        masked.zero_neurons(now.index, [j for j in range(masked.I) if j not in kept])
        if now.attention is None:
            masked.zero_attention(now.index)
    difference = logits(result.model).numpy() - masked.logits(TOKENS)
    assert len(result.report.numbers["attentions_removed"]) >= 2
    assert abs(difference).max() < 1e-5


def columns_kept(before: Any, after: Any) -> list[int]:
    """Which neurons of a linear are left, found by comparing its weights."""
    transposed = type(before).__name__ == "Conv1D"
    old, new = (m.weight if transposed else m.weight.T for m in (before, after))
    return [int((old == row).all(1).nonzero()[0, 0]) for row in new]


def test_cutting_blocks_is_skipping_them(architecture: str) -> None:
    model = tiny(architecture).double()
    result = METHODS["shortgpt"].compress(model, ROWS, method_config("shortgpt", OPTIONS["shortgpt"]))
    masked = Reference(model)
    for b in result.report.numbers["blocks_removed"]:
        masked.skip_block(b)
    assert abs(logits(result.model).numpy() - masked.logits(TOKENS)).max() < 1e-5


# 2. nothing to remove = identity


def test_nothing_to_remove_changes_nothing_bit_for_bit(method: str, architecture: str) -> None:
    model = tiny(architecture)
    result = run(method, model, sparsity=0)
    assert fingerprint(result.model) == fingerprint(model)
    assert torch.equal(logits(result.model), logits(model))
    assert result.report.numbers["parameters_after"] == result.report.numbers["parameters_before"]


def test_a_divisor_does_not_matter_when_there_is_nothing_to_remove() -> None:
    result = run("2ssp", tiny("llama"), sparsity=0, divisor=64)
    assert fingerprint(result.model) == fingerprint(tiny("llama"))
    assert list(result.report.numbers["ffn_widths"]) == [b.intermediate_size for b in layout_of(result.model).blocks]


# 3. save, load


def test_a_saved_model_loads_with_the_same_logits_layout_and_bytes(
    method: str, architecture: str, tmp_path: Path
) -> None:
    result = compressed(method, architecture)
    manifest = save(result, tmp_path / "a")
    loaded = load(str(tmp_path / "a"))
    assert layout_of(loaded.model) == layout_of(result.model)
    assert type(loaded.model) is type(result.model)
    assert torch.equal(logits(loaded.model), logits(result.model))
    assert torch.equal(decode(loaded.model, TOKENS), decode(result.model, TOKENS))
    again = artifact.save(loaded.model, byte_tokenizer(), tmp_path / "b", origin=manifest.origin, steps=manifest.steps)
    weights = [name for name in manifest.files if name.endswith(".safetensors")]
    assert weights
    assert {name: again.files[name] for name in weights} == {name: manifest.files[name] for name in weights}


def test_stock_transformers_loads_a_plain_artifact_and_trusted_code_a_ragged_one(
    method: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    result = compressed(method, architecture)
    save(result, tmp_path / "a")
    ragged = layout_of(result.model).kind == "ragged"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=ragged, dtype="auto").eval()
    assert torch.equal(logits(loaded), logits(result.model))
    assert (loaded.config.model_type == architecture) is not ragged
    assert loaded.config.get_text_config().vocab_size == result.model.config.vocab_size


def test_a_ragged_folder_that_lost_its_manifest_is_still_read_as_ragged(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an artifact comes back from a hub: the model must not be taken for one with all its attentions."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    result = compressed("2ssp", architecture)
    save(result, tmp_path / "a")
    (tmp_path / "a" / artifact.MANIFEST).unlink()
    loaded = load(str(tmp_path / "a")).model
    assert layout_of(loaded) == layout_of(result.model)
    assert torch.equal(logits(loaded), logits(result.model))


WITHOUT_FOLDAWAY = """
import json, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        new = model.generate(tokens[:1, :5], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        torch.save({"logits": model(input_ids=tokens, use_cache=False).logits, "new": new}, path + "/seen.pt")
assert not {"compress", "exporters"} & set(sys.modules), "foldaway was imported"
"""


def test_ragged_artifacts_run_where_foldaway_is_not_installed(tmp_path: Path) -> None:
    for model_type in ARCHITECTURES:
        save(compressed("2ssp", model_type), tmp_path / model_type)
    # An import of the library would fail: its packages are hidden by empty ones.
    for package in ("compress", "exporters", "serving", "benchmarks", "deploy"):
        (tmp_path / "hidden").mkdir(exist_ok=True)
        (tmp_path / "hidden" / f"{package}.py").write_text("raise ImportError('foldaway is not installed here')\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "hidden"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    paths = [str(tmp_path / model_type) for model_type in ARCHITECTURES]
    command = [sys.executable, "-c", WITHOUT_FOLDAWAY, json.dumps(TOKENS.tolist()), *paths]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for model_type in ARCHITECTURES:
        ours, seen = compressed("2ssp", model_type).model, torch.load(tmp_path / model_type / "seen.pt")
        assert torch.allclose(seen["logits"], logits(ours), atol=1e-5), model_type
        assert torch.equal(seen["new"], greedy(ours, TOKENS[:1, :5], 20)), model_type


# 4. cached decoding = full forward


def assert_decodes(model: PreTrainedModel) -> None:
    full = logits(model)
    for prompt in (1, 3, 12):
        assert torch.allclose(decode(model, TOKENS, prompt)[:, -28:], full[:, -28:], atol=1e-4)


def test_decoding_with_a_cache_gives_the_logits_of_a_full_pass(method: str, architecture: str) -> None:
    assert_decodes(compressed(method, architecture).model)


@pytest.mark.parametrize("gone", [[0], [0, 1], [0, 1, 3, 4], [2], [1, 2, 3], [0, 2, 4]])
def test_any_attentions_may_go_and_the_cache_still_decodes(architecture: str, gone: list[int]) -> None:
    model = tiny(architecture)
    drop_attention(model, gone)
    assert_decodes(model)
    ranks = [block.attention.layer_idx for block in Decoder(model) if block.attention is not None]
    assert ranks == list(range(len(Decoder(model)) - len(gone)))


def test_gemma3_decodes_when_all_its_sliding_or_all_its_full_attentions_are_gone() -> None:
    for gone in ([0, 1, 3, 4], [2, 5]):
        model = tiny("gemma3_text")
        assert {model.config.layer_types[b] for b in gone} == {model.config.layer_types[gone[0]]}
        drop_attention(model, gone)
        assert_decodes(model)


@pytest.mark.parametrize("gone", [[0], [2], [1, 2], [3, 4]])
def test_gemma3_keeps_the_attention_types_of_the_blocks_that_stay(gone: list[int]) -> None:
    model = tiny("gemma3_text")
    types = list(model.config.layer_types)
    drop_blocks(model, gone)
    assert list(model.config.layer_types) == [kind for b, kind in enumerate(types) if b not in gone]
    masked = Reference(tiny("gemma3_text"))
    for b in gone:
        masked.skip_block(b)
    assert abs(logits(model).numpy() - masked.logits(TOKENS)).max() < 1e-3
    assert_decodes(model)


@pytest.mark.parametrize("gone", [[], [0], [0, 1], [2, 3, 4]])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_models_with_a_window_decode_beyond_it(model_type: str, gone: list[int], tmp_path: Path) -> None:
    model = windowed(model_type)
    drop_attention(model, gone)
    assert_decodes(model)
    artifact.write_model(model, byte_tokenizer(), tmp_path)
    auto_class = FoldawayForCausalLM if gone else AutoModelForCausalLM
    reloaded = auto_class.from_pretrained(tmp_path, dtype="auto").eval()
    assert torch.equal(decode(reloaded, TOKENS), decode(model, TOKENS))


@pytest.mark.parametrize("model_type", WINDOWED)
def test_the_last_block_of_these_models_sees_a_window_and_no_further(model_type: str) -> None:
    model = windowed(model_type)
    drop_blocks(model, [0, 1, 2, 3])
    other = TOKENS.clone()
    other[:, 0] = (other[:, 0] + 1) % 256
    differs = (logits(model) - logits(model, other)).abs().amax(dim=(0, 2)) > 0
    assert differs.tolist() == [True] * 8 + [False] * (TOKENS.shape[1] - 8)
    assert_decodes(model)


def greedy(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely continuation, from full passes."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_continues_as_full_passes_would(method: str, architecture: str, cache: str | None) -> None:
    model = compressed(method, architecture).model
    prompt = TOKENS[:1, :5]
    options: dict[str, Any] = {"cache_implementation": cache} if cache else {}
    new = model.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=258, disable_compile=True, **options
    )
    assert torch.equal(new, greedy(model, prompt, 20))


def test_prompts_of_different_lengths_generate_together_as_alone(method: str, architecture: str) -> None:
    model = compressed(method, architecture).model
    short, long = TOKENS[:1, :5], TOKENS[1:, :12]
    padded = torch.cat([torch.cat([torch.full((1, 7), 258), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :7] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[0, 7:], greedy(model, short, 8)[0])
    assert torch.equal(together[1], greedy(model, long, 8)[0])


# 5. budget met, and numbers that a recount confirms


def recount(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in {p.data_ptr(): p for p in model.state_dict().values()}.values())


def test_the_report_agrees_with_a_recount_of_the_weights(method: str, architecture: str) -> None:
    dense, result = tiny(architecture), compressed(method, architecture)
    numbers, masked = result.report.numbers, Reference(dense)
    buffers = sum(b.numel() for name, b in dense.named_buffers() if name in dense.state_dict())
    assert numbers["parameters_before"] == recount(dense) - buffers
    assert numbers["parameters_after"] == recount(result.model) - buffers
    gone = numbers["parameters_before"] - numbers["parameters_after"]
    assert numbers["sparsity_of_blocks"] == pytest.approx(gone / masked.P_blk)
    assert numbers["sparsity_of_model"] == pytest.approx(gone / numbers["parameters_before"])
    layout = layout_of(result.model)
    if method == "2ssp":
        assert list(numbers["ffn_widths"]) == [block.intermediate_size for block in layout.blocks]
        removed = set(range(masked.B)) - set(layout.attention_blocks)
        assert set(numbers["attentions_removed"]) == removed
    else:
        assert len(layout.blocks) == masked.B - len(numbers["blocks_removed"])
    assert json.loads(json.dumps(numbers)) == numbers


@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.6])
def test_2ssp_meets_its_budget_within_one_neuron_a_block(architecture: str, sparsity: float) -> None:
    masked, result = Reference(tiny(architecture)), run("2ssp", tiny(architecture), sparsity=sparsity, alpha=1.0)
    gone = result.report.numbers["parameters_before"] - result.report.numbers["parameters_after"]
    norms = len(result.report.numbers["attentions_removed"]) * 2 * 2 * D  # the norms that only they needed
    unit = masked.B * masked.f / masked.I
    assert -unit <= gone - sparsity * masked.P_blk <= unit + norms


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.6])
def test_shortgpt_removes_the_fewest_blocks_that_reach_the_target(architecture: str, sparsity: float) -> None:
    result = run("shortgpt", tiny(architecture), sparsity=sparsity)
    B, gone = len(Decoder(tiny(architecture))), len(result.report.numbers["blocks_removed"])
    assert (gone - 1) / B < sparsity <= gone / B + 1e-9


@pytest.mark.parametrize("divisor", [8, 16])
def test_a_divisor_makes_every_width_a_multiple_and_the_report_says_what_was_reached(
    architecture: str, divisor: int
) -> None:
    result = run("2ssp", tiny(architecture), divisor=divisor)
    widths = [block.intermediate_size for block in layout_of(result.model).blocks]
    assert all(width % divisor == 0 for width in widths)
    assert list(result.report.numbers["ffn_widths"]) == widths
    masked = Reference(tiny(architecture))
    assert abs(result.report.numbers["sparsity_of_blocks"] - 0.5) < (masked.a + masked.f / 2) / masked.P_blk


def test_stage_2_reports_the_block_passes_it_really_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in ARCHITECTURES:
        model, passes = tiny(model_type), []
        block = type(Decoder(model).blocks[0].module)
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, f=forward, p=passes, **k: (p.append(1), f(*a, **k))[1])
        result = run("2ssp", model)
        monkeypatch.undo()
        stage_1 = len(ROWS.tokens) * len(Decoder(model))
        numbers = result.report.numbers
        B, removed = len(Decoder(model)), len(numbers["attentions_removed"])
        assert numbers["stage2_block_forwards"] == len(passes) - stage_1, model_type
        assert numbers["stage2_block_forwards_naive"] == B * (1 + sum(B - k for k in range(removed)))
        assert numbers["stage2_block_forwards"] < 0.75 * numbers["stage2_block_forwards_naive"]


# 6. the input model is unchanged


def test_the_model_that_was_given_is_unchanged(method: str, architecture: str) -> None:
    model = tiny(architecture)
    before = fingerprint(model)
    result = run(method, model)
    assert fingerprint(model) == before
    assert fingerprint(result.model) != before


def test_consume_cuts_the_model_given_and_gives_the_same_result(method: str, architecture: str) -> None:
    model = tiny(architecture)
    result = run(method, model, Run(consume=True))
    assert result.model is model
    assert fingerprint(model) == fingerprint(compressed(method, architecture).model)


# 7. same seed, same bytes


def test_the_same_input_gives_the_same_bytes(method: str, architecture: str, tmp_path: Path) -> None:
    first = save(run(method, tiny(architecture)), tmp_path / "a")
    second = save(run(method, tiny(architecture)), tmp_path / "b")
    assert first.id == second.id
    assert first.files == second.files


# 8. every field matters


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in METHODS for name in CHANGES[method]])
def test_every_option_changes_the_result(method: str, name: str) -> None:
    value = CHANGES[method][name][0]
    # Over the architectures, because a small change of one option may leave one model's choice as it was.
    changed = [
        fingerprint(run(method, tiny(model_type), **{name: value}).model)
        != fingerprint(compressed(method, model_type).model)
        for model_type in ARCHITECTURES
    ]
    assert any(changed)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [(method, name, bad) for method in METHODS for name, (_, values) in CHANGES[method].items() for bad in values],
)
def test_options_that_cannot_be_meant_are_refused(method: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        run(method, tiny("llama"), **{name: value})
    assert "\n" not in str(caught.value)


def test_no_option_is_left_out_of_these_tests(method: str) -> None:
    assert set(CHANGES[method]) == {field.name for field in dataclasses.fields(METHODS[method].config)}


def test_an_unknown_option_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        method_config(method, {"sparsity": 0.2, "sparsty": 0.3})


def test_a_target_that_cannot_be_reached_is_refused(method: str, architecture: str) -> None:
    model = tiny(architecture)
    before = fingerprint(model)
    with pytest.raises(FoldawayError) as caught:
        run(method, model, sparsity=0.97)
    assert "\n" not in str(caught.value)
    assert fingerprint(model) == before


# methods chain


@pytest.mark.parametrize("chain", [("shortgpt", "2ssp"), ("2ssp", "shortgpt"), ("2ssp", "2ssp")])
def test_methods_chain_and_their_result_saves_loads_and_decodes(
    architecture: str, chain: tuple[str, str], tmp_path: Path
) -> None:
    mild = {"2ssp": {"sparsity": 0.4, "alpha": 0.7}, "shortgpt": {"sparsity": 0.2}}
    first = run(chain[0], tiny(architecture), **mild[chain[0]])
    mild["2ssp"] = {"sparsity": 0.3, "alpha": 0.25}  # fewer attentions: FFNs are small by now
    before = fingerprint(first.model)
    second = run(chain[1], first.model, **mild[chain[1]])
    assert fingerprint(first.model) == before
    assert budget.count(second.model).total < budget.count(first.model).total
    assert_decodes(second.model)
    save(second, tmp_path / "a")
    loaded = load(str(tmp_path / "a")).model
    assert torch.equal(logits(loaded), logits(second.model))
    assert layout_of(loaded) == layout_of(second.model)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_half_precision_stays_half_precision(method: str, model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    for parameter in model.parameters():  # and no buffer: rotary frequencies stay in fp32, as in a loaded model
        parameter.data = parameter.data.bfloat16()
    result = run(method, model)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    save(result, tmp_path / "a")
    loaded = load(str(tmp_path / "a")).model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(result.model))


def test_a_copy_of_a_ragged_model_is_independent_of_it(architecture: str) -> None:
    model = compressed("2ssp", architecture).model
    before = fingerprint(model)
    for twin in (clone(model), copy.deepcopy(model)):
        assert torch.equal(logits(twin), logits(model))
        drop_attention(twin, [layout_of(twin).attention_blocks[-1]])
    assert fingerprint(model) == before
    assert base_config(model.config).model_type == architecture


def test_the_context_of_the_tiny_models_is_longer_than_what_these_tests_read() -> None:
    assert TOKENS.shape[1] <= CONTEXT
