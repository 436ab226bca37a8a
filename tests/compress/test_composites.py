"""Vision-language models: the language tower is cut, and everything beside it stays as it was."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from benchmarks.scoring import logits_scorer, torch_scorer
from compress import artifact, budget
from compress.arch import COMPOSITES, NOT_SUPPORTED, architecture_of
from compress.calibration import TokenRows, context_length_of
from compress.decoder import Decoder
from compress.errors import ConfigError, LayoutNotSupported, UnsupportedArchitecture
from compress.evaluate import logits_of
from compress.grafting import Grafts, Ranks
from compress.layout import BlockLayout, layout_of
from compress.methods import METHODS, method_config
from compress.recording import record
from compress.remote_code import submodule
from compress.result import CompressedModel, Run
from compress.sources import PROCESSOR_FILE_BYTES, PROCESSOR_FILES, load, read_processor, skeleton
from compress.spill import Store
from compress.surgery import clone, drop_attention, drop_blocks, drop_ffn, keep_neurons, without_weights
from deploy.cli import main
from exporters.to_onnx import check_layout
from tests.compress import test_properties
from tests.conftest import _COMMON, CHAT_TEMPLATE, CONTEXT, TINY, D, F, K, L, V, byte_tokenizer, covering, token_rows
from tests.conftest import tiny as text_model

IMAGE, VIDEO, START, END = 255, 254, 253, 252  # token ids
IMAGE_TOKENS = 4
VISION_WIDTH = 32

_VISION: dict[str, Any] = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
_QWEN_TEXT: dict[str, Any] = {
    **{key: value for key, value in _COMMON.items() if key != "head_dim"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_SMOL: dict[str, Any] = {
    "text_config": {**_COMMON, "model_type": "llama"},
    "vision_config": {**_VISION, "hidden_size": VISION_WIDTH, "image_size": 16, "patch_size": 4},
    "scale_factor": 2,
    "image_token_id": IMAGE,
    "pad_token_id": 258,
}


def _llava(text: str) -> dict[str, Any]:
    return {
        "text_config": {**_COMMON, **TINY[text], "model_type": text},
        "vision_config": {
            **_VISION,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,  # the last one is not used
            "hidden_size": VISION_WIDTH,
            "image_size": 8,
            "patch_size": 4,
        },
        "image_token_index": IMAGE,
        "image_seq_length": IMAGE_TOKENS,
    }


COMPOSITE: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", _llava("llama")),
    "llava over gemma3": ("llava", _llava("gemma3_text")),
    "qwen2_vl": (
        "qwen2_vl",
        {
            "text_config": _QWEN_TEXT,
            "vision_config": {**_QWEN_VISION, "embed_dim": VISION_WIDTH, "hidden_size": D, "mlp_ratio": 2},
            **_QWEN_TOKENS,
        },
    ),
    # Sliding and full attention mixed: a removal that renumbers the wrong list changes their places.
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {**_QWEN_TEXT, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": VISION_WIDTH,
                "intermediate_size": 48,
                "out_hidden_size": D,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_TOKENS,
        },
    ),
    "idefics3": ("idefics3", _SMOL),
    "smolvlm": ("smolvlm", _SMOL),
}
BY_BLOCK: dict[str, dict[str, Any]] = {
    "fusegpt": {
        "sparsity": 0.3,
        "window": 4,
        "coefficient_rank": 4,
        "lora_rank": 4,
        "batch": 2,
        "epochs": 4,
        "coefficient_lr": 1e-2,
        "base_lr": 1e-3,
    },
    "shortgpt": {"sparsity": 0.3},
    "window": {"sparsity": 0.3},
    "sleb": {"sparsity": 0.3},
}
BY_NEURON = {
    "magnitude": {"sparsity": 0.3},
    "wanda": {"sparsity": 0.3},
    "minitron": {"sparsity": 0.3, "cut": "ffn", "divisor": 1},
}
PLAIN: dict[str, dict[str, Any]] = {**BY_BLOCK, **BY_NEURON}
RAGGED: dict[str, dict[str, Any]] = {
    "2ssp": {"sparsity": 0.5, "alpha": 1.0},
    "blockpruner": {"sparsity": 0.4},
    "random": {"sparsity": 0.5, "alpha": 1.0},
}
RECORDED = {"fusegpt": "scores", "shortgpt": "block_influence", "window": "window_similarity"}
"""Methods that calibrate on images -> what they report of what they saw."""
ROWS = token_rows(4, 24)
PROCESSOR = {
    "preprocessor_config.json": b'{"image_processor_type": "CLIPImageProcessor",  "size": 8}\n',
    "processor_config.json": b'{"processor_class": "LlavaProcessor"}',
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "chat_template.jinja": CHAT_TEMPLATE.encode(),
}


@functools.cache
def _tiny(name: str) -> PreTrainedModel:
    model_type, options = COMPOSITE[name]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(options))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny(name: str) -> PreTrainedModel:
    """A random vision-language model; a fresh copy each time."""
    return copy.deepcopy(_tiny(name))


@pytest.fixture(params=sorted(COMPOSITE))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pictures(name: str, rows: int = 2, length: int = 24, seed: int = 3) -> dict[str, Tensor]:
    """What the processor of a model would give for so many images with text around them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (rows, length), generator=generator)
    ids[:, 2], ids[:, 3 + IMAGE_TOKENS] = START, END
    ids[:, 3 : 3 + IMAGE_TOKENS] = IMAGE
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if COMPOSITE[name][0].startswith("qwen"):
        # One image of 4 x 4 patches of 4 x 4 pixels, twice in time, which are merged two by two.
        pixels = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4]] * rows)
        return {**given, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).long()}
    shape = (rows, 1, 3, 16, 16) if COMPOSITE[name][1] is _SMOL else (rows, 3, 8, 8)
    return {**given, "pixel_values": torch.randn(shape, generator=generator)}


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    output: Tensor = model(**inputs, use_cache=False).logits
    return output


def run(method: str, model: PreTrainedModel, rows: TokenRows = ROWS, **options: Any) -> CompressedModel:
    return METHODS[method].compress(model, rows, method_config(method, {**PLAIN.get(method, {}), **options}))


def save(result: CompressedModel, path: Path) -> artifact.Manifest:
    return test_properties.save(result, path, PROCESSOR)


def decode(model: PreTrainedModel, inputs: dict[str, Tensor], prompt: int) -> Tensor:
    """Logits of a prefill with its images and then one token at a time, with the model's own cache."""
    ids, seen = inputs["input_ids"], {"input_ids", "attention_mask", "mm_token_type_ids"}
    first = {key: value[:, :prompt] if key in seen else value for key, value in inputs.items()}
    with torch.no_grad():
        output = model(**first, use_cache=True)
        parts = [output.logits]
        for place in range(prompt, ids.shape[1]):
            output = model(input_ids=ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def beside(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors that are not the decoder blocks'."""
    blocks = Decoder(model).arch.blocks + "."
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(blocks)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def dense(name: str, path: Path) -> Path:
    """A folder as a hub would give it."""
    artifact.write_model(tiny(name), byte_tokenizer(), path, PROCESSOR)
    return path


# the language tower is found


def test_every_composite_is_tested() -> None:
    assert {model_type for model_type, _ in COMPOSITE.values()} == set(COMPOSITES)


def test_the_decoder_is_the_language_tower(name: str) -> None:
    model = tiny(name)
    decoder = Decoder(model)
    blocks = 6 if "gemma3" in name else L
    assert len(decoder) == decoder.config.num_hidden_layers == blocks
    assert decoder.config.hidden_size == D
    assert context_length_of(model) == CONTEXT
    assert set(layout_of(model).blocks) == {BlockLayout(attention=True, num_key_value_heads=K, intermediate_size=F)}
    assert decoder.block_list is submodule(model, decoder.arch.blocks)
    assert layout_of(model).kind == "plain"


def test_what_is_counted_is_the_whole_model_and_its_decoder_blocks(name: str) -> None:
    model = tiny(name)
    counts = budget.count(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    blocks = Decoder(model).arch.blocks + "."
    assert counts.blocks == sum(p.numel() for key, p in model.named_parameters() if key.startswith(blocks))
    assert sum(counts.attention) + sum(counts.ffn) < counts.blocks < counts.total


def test_dropping_blocks_is_running_without_them(name: str) -> None:
    model, inputs = tiny(name), pictures(name)
    cut = clone(model)
    drop_blocks(cut, [0, 3])
    masked = copy.deepcopy(model)
    for b in (0, 3):
        block: Any = Decoder(masked).blocks[b].module
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert torch.equal(logits(cut, **inputs), logits(masked, **inputs))
    assert Decoder(cut).config.num_hidden_layers == len(Decoder(model)) - 2
    kinds = getattr(Decoder(model).config, "layer_types", None)
    if kinds is not None:
        left = [kind for b, kind in enumerate(kinds) if b not in (0, 3)]
        assert Decoder(cut).config.layer_types == left
    assert same(beside(cut), beside(model))


# methods whose result is plain


@covering("method", list(PLAIN), "name", sorted(COMPOSITE))
def test_a_method_cuts_the_language_tower_and_nothing_else(method: str, name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name), pictures(name)
    before = beside(tiny(name))
    result = run(method, model)
    numbers, counts = result.report.numbers, budget.count(result.model)
    assert same(beside(model), before)
    assert same(beside(result.model), before)
    assert layout_of(result.model).kind == "plain"
    assert counts.blocks < budget.count(model).blocks
    assert numbers["parameters_after"] == counts.total
    removed = numbers["parameters_before"] - numbers["parameters_after"]
    assert removed == budget.count(model).blocks - counts.blocks
    assert 0 < numbers["sparsity_of_model"] < numbers["sparsity_of_blocks"]
    save(result, tmp_path / "a")
    loaded = load(str(tmp_path / "a"))
    assert torch.equal(logits(loaded.model, **inputs), logits(result.model, **inputs))
    assert layout_of(loaded.model) == layout_of(result.model)
    assert same(beside(loaded.model), before)
    assert loaded.processor == PROCESSOR


@covering("method", list(BY_BLOCK), "name", sorted(COMPOSITE))
def test_cached_generation_after_an_image_is_the_full_forward_pass(method: str, name: str) -> None:
    model = run(method, tiny(name)).model
    inputs = pictures(name)
    assert torch.allclose(decode(model, inputs, 10), logits(model, **inputs), atol=1e-4)


@covering("method", ["shortgpt", "wanda"], "name", sorted(COMPOSITE))
def test_stock_transformers_loads_the_artifact(method: str, name: str, tmp_path: Path) -> None:
    result = run(method, tiny(name))
    manifest = save(result, tmp_path / "a")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "a", local_files_only=True).eval()
    inputs = pictures(name)
    assert type(stock) is type(result.model)
    assert torch.equal(logits(stock, **inputs), logits(result.model, **inputs))
    assert manifest.model_type == COMPOSITE[name][0]
    assert (manifest.layout.kind, len(manifest.layout.blocks)) == ("plain", len(Decoder(stock)))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert not {"auto_map", "block_configs", "num_hidden_layers", "ffn_dim"} & set(config)
    assert config["text_config"]["num_hidden_layers"] == len(Decoder(stock))
    assert not list((tmp_path / "a").glob("*.py"))
    assert "AutoModelForImageTextToText" in (tmp_path / "a" / "README.md").read_text()


def test_the_bytes_beside_the_blocks_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    source = dense(name, tmp_path / "dense")
    loaded = load(str(source))
    result = run("shortgpt", loaded.model)
    save(result, tmp_path / "a")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    towers = [key for key in before if "vis" in key or "projector" in key or "connector" in key]
    assert len(towers) > 10
    assert all(torch.equal(before[key], after[key]) for key in towers)
    assert {key for key in after if key in towers} == set(towers)
    for file, content in PROCESSOR.items():
        assert (tmp_path / "a" / file).read_bytes() == content


def test_an_artifact_is_compressed_again_and_keeps_its_processor(tmp_path: Path) -> None:
    save(run("shortgpt", tiny("llava")), tmp_path / "a")
    argv = ["compress", str(tmp_path / "a"), "--method", "wanda", "--set", "sparsity=0.2"]
    assert main([*argv, "--rows", "2", "--length", "24", "-o", str(tmp_path / "b")]) == 0
    again = load(str(tmp_path / "b"))
    assert again.processor == PROCESSOR
    assert len(artifact.read_manifest(tmp_path / "b").steps) == 2


# what would be ragged is refused


@covering("method", list(RAGGED), "name", sorted(COMPOSITE))
def test_a_method_that_makes_blocks_differ_is_refused(method: str, name: str) -> None:
    model = tiny(name)
    before = copy.deepcopy(model.state_dict())
    config = method_config(method, RAGGED[method])
    with pytest.raises(UnsupportedArchitecture, match="removes whole blocks"):
        METHODS[method].compress(model, ROWS, config, Run(consume=True))
    assert same(dict(model.state_dict()), before)
    with pytest.raises(UnsupportedArchitecture, match="removes whole blocks"):
        METHODS[method].outline(without_weights(model), 3, config)


@pytest.mark.parametrize("method", RAGGED)
def test_a_method_that_has_nothing_to_remove_is_not_refused(method: str) -> None:
    result = run(method, tiny("llava"), sparsity=0)
    inputs = pictures("llava")
    assert torch.equal(logits(result.model, **inputs), logits(tiny("llava"), **inputs))


def test_an_edit_that_makes_blocks_differ_changes_nothing() -> None:
    model = tiny("llava")
    before = budget.count(model)
    for edit in (
        lambda: drop_attention(model, [1]),
        lambda: drop_ffn(model, [1]),
        lambda: keep_neurons(model, {1: torch.arange(7)}),
    ):
        with pytest.raises(UnsupportedArchitecture):
            edit()
    assert budget.count(model) == before
    keep_neurons(model, {b: torch.arange(7) for b in range(L)})
    assert Decoder(model).config.intermediate_size == 7


def test_a_second_method_is_refused_before_the_first_one_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense("qwen2_vl", tmp_path / "dense")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\nmodel: {source}\ncalibration: {{rows: 2, length: 24}}\n"
        "steps: [{method: shortgpt, set: {sparsity: 0.2}}, {method: blockpruner, set: {sparsity: 0.2}}]\n"
        "gate: {limits: [{metric: perplexity, max_ratio: 2}]}"
    )
    monkeypatch.setattr("deploy.steps.draw", lambda *args, **kwargs: pytest.fail("the first method began"))
    assert main(["compress", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 2
    assert "qwen2_vl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shapes_alone_are_as_the_model_is(name: str) -> None:
    model = tiny(name)
    shape = without_weights(model)
    assert budget.count(shape) == budget.count(model)
    assert layout_of(shape) == layout_of(model)
    assert {p.device.type for p in [*shape.parameters(), *shape.buffers()]} == {"meta"}
    drop_blocks(shape, [1])
    assert len(Decoder(model)) == len(Decoder(shape)) + 1 == Decoder(model).config.num_hidden_layers


# what is not possible says so


@pytest.mark.parametrize("model_type", sorted(NOT_SUPPORTED))
def test_deepstack_is_refused_with_its_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match="deepstack"):
        architecture_of(AutoConfig.for_model(model_type))


def test_a_language_tower_that_is_not_known_is_refused() -> None:
    config = AutoConfig.for_model("llava", text_config={"model_type": "bloom"})
    with pytest.raises(UnsupportedArchitecture, match="'bloom' is not known"):
        architecture_of(config)


def test_a_language_tower_alone_is_refused(tmp_path: Path) -> None:
    tiny("qwen2_vl").model.language_model.save_pretrained(tmp_path / "tower")
    for look in (load, skeleton):
        with pytest.raises(UnsupportedArchitecture, match="whole"):
            look(str(tmp_path / "tower"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_onnx_serving_and_fine_tuning_are_refused_with_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(dense(name, tmp_path / "dense"))
    (tmp_path / "text.jsonl").write_text('{"text": "one line of text"}\n')
    out = str(tmp_path / "out")
    for argv in (
        ["export", source, "--to", "onnx", "-o", out],
        ["export", source, "--to", "onnx", "--dry-run"],
        ["serve", source, "--port", "0"],
        ["bench", source, "--baseline", source, "-o", out],
        ["finetune", source, "--data", str(tmp_path / "text.jsonl"), "-o", out],
    ):
        assert main(argv) == 2
        complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("foldaway: ")]
        assert len(complaints) == 1
        assert COMPOSITE[name][0] in complaints[0]
        assert "--to hf" in complaints[0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(LayoutNotSupported):
        check_layout(tiny(name))


# the command line, on text


@pytest.mark.parametrize(
    ("name", "method"), [("llava", "fusegpt"), ("qwen2_5_vl", "fusegpt"), ("smolvlm", "sleb"), ("qwen2_vl", "wanda")]
)
def test_the_command_line_predicts_compresses_measures_and_exports(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, made, exported = dense(name, tmp_path / "dense"), tmp_path / "made", tmp_path / "hf"
    options = [word for option in PLAIN[method].items() for word in ("--set", "{}={}".format(*option))]
    how = ["--method", method, *options, "--rows", "2", "--length", "24"]

    def last() -> Any:
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert main(["compress", str(source), *how, "--dry-run"]) == 0
    predicted = last()
    assert main(["compress", str(source), *how, "-o", str(made)]) == 0
    assert (predicted["parameters"], predicted["layout"]) == (last()["parameters_after"], "plain")
    assert main(["eval", str(made), "--against", str(source), "--window", "24", "--windows", "2"]) == 0
    assert main(["export", str(made), "--to", "hf", "--check-tokens", "16", "-o", str(exported)]) == 0
    assert {file: (exported / file).read_bytes() for file in PROCESSOR} == PROCESSOR
    stock = AutoModelForImageTextToText.from_pretrained(exported, local_files_only=True).eval()
    inputs = pictures(name)
    assert torch.equal(logits(stock, **inputs), logits(load(str(made)).model, **inputs))
    assert main(["show", str(made)]) == 0


def test_calibration_on_the_models_own_samples_works(tmp_path: Path) -> None:
    source, out = dense("qwen2_5_vl", tmp_path / "dense"), tmp_path / "out"
    argv = ["compress", str(source), "--method", "shortgpt", "--set", "sparsity=0.3", "--calibration", "self"]
    assert main([*argv, "--rows", "2", "--length", "16", "-o", str(out)]) == 0


def test_both_scorers_of_tasks_agree(name: str) -> None:
    model = run("shortgpt", tiny(name)).model
    rows = token_rows(1, 40, seed=6).tokens[0].tolist()
    questions = [(rows[:12], [rows[12:15], rows[20:25]]), (rows[:5], [rows[30:33]])]
    for ours, theirs in zip(torch_scorer(model)(questions), logits_scorer(logits_of(model))(questions), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_half_precision(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name), pictures(name, rows=4)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    rows = record(model, [inputs])
    assert rows.recorded is not None
    assert rows.recorded.embeds.dtype == torch.bfloat16
    result = run("fusegpt", model, rows)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    save(result, tmp_path / "a")
    assert torch.equal(logits(load(str(tmp_path / "a")).model, **inputs), logits(result.model, **inputs))


def test_of_a_hub_id_the_files_of_the_processor_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert (name, allow_patterns) == ("owner/name", list(PROCESSOR_FILES))
        return str(dense("llava", tmp_path / "dense"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert read_processor("owner/name") == PROCESSOR


def test_a_processor_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    source = dense("llava", tmp_path / "dense")
    (source / "chat_template.jinja").write_bytes(b" " * (PROCESSOR_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger"):
        load(str(source))


# recorded embeddings


def test_what_is_recorded_gives_the_logits_of_the_images(name: str) -> None:
    model, parts = tiny(name), [pictures(name), pictures(name, rows=1, seed=4)]
    rows = record(model, parts)
    assert rows.recorded is not None
    assert rows.tokens.shape == (3, 24)
    assert rows.recorded.embeds.shape == (3, 24, D)
    wanted = torch.cat([logits(tiny(name), **each) for each in parts])
    assert torch.allclose(logits(model, **rows.batch(slice(None), "cpu")), wanted, atol=1e-5)
    chosen = torch.tensor([2, 0])
    assert torch.allclose(logits(model, **rows.batch(chosen, "cpu")), wanted[chosen], atol=1e-5)
    blind = logits(model, input_ids=rows.tokens)
    assert not torch.allclose(blind, wanted, atol=1e-2)


def test_positions_of_images_are_recorded_where_the_model_has_them() -> None:
    rows = record(tiny("qwen2_vl"), [pictures("qwen2_vl")])
    assert rows.recorded is not None
    assert rows.recorded.position_ids is not None
    assert rows.recorded.position_ids.shape == (2, 3, 24)
    assert not torch.equal(rows.recorded.position_ids[0, 0], rows.recorded.position_ids[0, 1])
    assert record(tiny("llava"), [pictures("llava")]).recorded.position_ids is None  # type: ignore[union-attr]


def test_rows_with_and_without_an_image_lie_side_by_side(name: str) -> None:
    model, words = tiny(name), {"input_ids": token_rows(2, 24, seed=5).tokens}
    rows = record(model, [words, pictures(name), words])
    wanted = [logits(tiny(name), **words), logits(tiny(name), **pictures(name))]
    found = logits(model, **rows.batch(slice(None), "cpu"))
    assert torch.allclose(found, torch.cat([*wanted, wanted[0]]), atol=1e-5)


def test_recording_leaves_the_model_as_it_was(name: str) -> None:
    model, parts = tiny(name), [pictures(name, rows=1)]
    record(model, parts)
    for module in model.modules():
        assert not module._forward_pre_hooks
    two = {"input_ids": token_rows(2, 24).tokens}
    assert torch.allclose(decode(model, two, 3), logits(tiny(name), **two), atol=1e-4)


def test_a_length_cuts_rows_of_different_lengths(name: str) -> None:
    model, parts = tiny(name), [pictures(name), pictures(name, rows=1, length=31)]
    rows = record(model, parts, length=20)
    wanted = torch.cat([logits(tiny(name), **each)[:, :20] for each in parts])
    assert rows.tokens.shape == (3, 20)
    assert torch.allclose(logits(model, **rows.batch(slice(None), "cpu")), wanted, atol=1e-4)
    padded = pictures(name)
    padded["attention_mask"][:, 20:] = 0
    assert len(record(model, [padded], length=20).tokens) == 2


def test_rows_that_cannot_be_recorded_are_refused() -> None:
    model = tiny("llava")
    short, long, padded = pictures("llava"), pictures("llava", length=30), pictures("llava")
    padded["attention_mask"][0, 0] = 0
    for inputs, length, word in (
        ([short, long], None, "length=T"),
        ([long, short], 30, "30"),
        ([padded], None, "padded"),
        ([], None, "nothing"),
        ([{"pixel_values": short["pixel_values"]}], None, "input_ids"),
        ([pictures("llava", length=CONTEXT + 1)], None, "context"),
        ([short], 1, "at least 2"),
    ):
        with pytest.raises(ConfigError, match=word):
            record(model, inputs, length=length)
    with pytest.raises(UnsupportedArchitecture, match="text only"):
        record(text_model("llama"), [short])


def test_the_example_in_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    code = text.split("<!-- example: images -->")[1].split("```python")[1].split("```")[0]
    small = [f'"{key}": {value}' for key, value in BY_BLOCK["fusegpt"].items() if key != "sparsity"]
    for long, short in {
        '"llava-hf/llava-1.5-7b-hf"': repr(str(dense("llava", tmp_path / "dense"))),
        "), ...]": ")] * 2",
        "length=1024": "length=20",
        '{"sparsity": 0.25}': f'{{"sparsity": 0.25, {", ".join(small)}}}',
    }.items():
        assert long in code
        code = code.replace(long, short)
    given = [pictures("llava", rows=1, length=30), pictures("llava", rows=1, seed=4)]

    class Processor:
        def __call__(self, *, images: str, text: str, return_tensors: str) -> dict[str, Tensor]:
            assert (images, return_tensors) == ("opened harbour.jpg", "pt")
            assert "<image>" in text
            return given.pop()

    opened = SimpleNamespace(open=lambda path: f"opened {path}")
    monkeypatch.setitem(sys.modules, "PIL", SimpleNamespace(Image=opened))
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda path: Processor())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/choosing.md", "exec"), {})
    manifest = artifact.verify(tmp_path / "llava-25")
    assert (manifest.steps[0].calibration or {})["source"] == "harbours"
    assert load(str(tmp_path / "llava-25")).processor == PROCESSOR


def test_the_hash_of_rows_covers_tokens_and_images() -> None:
    model, inputs = tiny("llava"), pictures("llava")
    first = record(model, [inputs])
    assert record(model, [inputs]).sha256 == first.sha256
    assert record(model, [{**inputs, "pixel_values": inputs["pixel_values"] + 1}]).sha256 != first.sha256
    words = inputs["input_ids"].clone()
    words[0, -1] = 7
    assert record(model, [{**inputs, "input_ids": words}]).sha256 != first.sha256
    assert first.record()["rows"] == 2


@covering("method", list(RECORDED), "name", sorted(COMPOSITE))
def test_a_method_calibrates_on_images(method: str, name: str) -> None:
    model = tiny(name)
    rows = record(model, [pictures(name, rows=4)])
    seen, blind = run(method, model, rows), run(method, model, TokenRows(rows.tokens, "tokens", "0" * 64, 0))
    assert seen.report.numbers[RECORDED[method]] != blind.report.numbers[RECORDED[method]]


def test_minitron_scores_on_images_and_leaves_channels_as_they_are(name: str) -> None:
    model = tiny(name)
    rows = record(model, [pictures(name, rows=4)])
    sizes = {"sparsity": 0, "num_hidden_layers": len(Decoder(model)) - 1}
    seen, blind = (
        run("minitron", model, each, **sizes) for each in (rows, TokenRows(rows.tokens, "tokens", "0" * 64, 0))
    )
    assert seen.report.numbers["block_scores"] != blind.report.numbers["block_scores"]
    for options, words in (
        ({"cut": "width"}, "cut=ffn or cut=depth"),
        ({"cut": "hidden"}, "cut=ffn or cut=depth"),
        ({"sparsity": 0, "hidden_size": 48}, "image features"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("minitron", model, **options)


def test_neighbours_learn_from_images_what_the_removed_block_did_with_them(name: str) -> None:
    model = tiny(name)
    rows = record(model, [pictures(name, rows=8)])
    numbers = run("fusegpt", model, rows, epochs=10).report.numbers
    assert all(tuning["loss_last"] < tuning["loss_first"] for tuning in numbers["tuning"])


def test_grafts_that_learnt_nothing_are_a_plain_removal(name: str) -> None:
    model, inputs = tiny(name), pictures(name)
    rows = record(model, [pictures(name, rows=4)])
    fused = run("fusegpt", model, rows, coefficient_lr=1e-30, base_lr=1e-30)
    cut = clone(model)
    drop_blocks(cut, fused.report.numbers["blocks_removed"])
    assert torch.allclose(logits(fused.model, **inputs), logits(cut, **inputs), atol=1e-5)


def test_folding_grafts_changes_nothing_that_an_image_leads_to(name: str) -> None:
    model, inputs, generator = tiny(name), pictures(name), torch.Generator().manual_seed(0)
    decoder, grafts = Decoder(model), Grafts(Ranks(4, 4), Store(Run()))
    donor, block = grafts.donor(decoder.blocks[1]), decoder.blocks[2]
    assert grafts.inject(block, 2, donor, 0, generator) == []
    with torch.no_grad():
        for graft in grafts.of(2).values():
            for parameter in graft.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        values = {f"{decoder.arch.blocks}.2.{path}": graft() for path, graft in grafts.of(2).items()}
        before = functional_call(model, values, (), {**inputs, "use_cache": False}).logits
    assert not torch.allclose(before, logits(model, **inputs), atol=1e-2)
    grafts.fold(block, 2)
    assert torch.allclose(logits(model, **inputs), before, atol=1e-5)


def test_a_fusion_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    model = tiny("qwen2_vl")
    rows = record(model, [pictures("qwen2_vl", rows=4)])
    config = {
        name: method_config("fusegpt", {**BY_BLOCK["fusegpt"], "sparsity": s}) for name, s in (("a", 0.2), ("b", 0.4))
    }
    whole = METHODS["fusegpt"].compress(model, rows, config["b"])
    METHODS["fusegpt"].compress(model, rows, config["a"], Run(scratch=tmp_path))
    resumed = METHODS["fusegpt"].compress(model, rows, config["b"], Run(scratch=tmp_path))
    assert resumed.report.resumed_seconds > 0
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.parametrize("method", ["2ssp", "sleb", "wanda"])
def test_a_method_that_would_not_see_the_images_refuses_them(method: str) -> None:
    model = tiny("llava")
    rows = record(model, [pictures("llava", rows=4)])
    with pytest.raises(ConfigError, match="text only"):
        run(method, model, rows, sparsity=0.3)


def test_a_ranking_by_loss_refuses_rows_with_images() -> None:
    model = tiny("llava")
    rows = record(model, [pictures("llava", rows=4)])
    with pytest.raises(ConfigError, match="another ranking"):
        run("fusegpt", model, rows, **{**BY_BLOCK["fusegpt"], "ranking": "loss"})


def test_the_tiny_composites_are_what_these_tests_take_them_for(name: str) -> None:
    model, inputs = tiny(name), pictures(name)
    other = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
    assert not torch.allclose(logits(model, **inputs), logits(model, **other), atol=1e-2)
    assert logits(model, **inputs).shape == (2, 24, V)
