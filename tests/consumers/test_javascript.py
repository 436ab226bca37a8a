"""transformers.js opens real exports, on Node and in headless Chromium, and generates what our session generates."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.consumers import javascript
from benchmarks.consumers.base import NEW_TOKENS, PROMPT
from benchmarks.consumers.javascript import CHROMIUM, NODE, Generated
from compress.errors import BackendError
from exporters import ExportOptions, export
from tests.conftest import byte_tokenizer, tiny, token_rows
from tests.consumers.conftest import Made
from tests.exporters.test_onnx import loaded

SCREENSHOT = Path(__file__).resolve().parents[2] / "runs" / "browser.png"
"""What the browser showed last; runs/ is not committed."""
QUANTISED = ("int8", "int4")
SAME_CHARACTERS = 40
"""Of quantised exports: ours computes their activations in int8, WebAssembly in fp32, and near ties part the texts."""


@functools.lru_cache(maxsize=1)
def on_the_page(made: Made) -> Generated:
    """What Chromium makes of an export; its page is kept as a picture."""
    CHROMIUM.prepare()
    SCREENSHOT.parent.mkdir(exist_ok=True)
    picture = SCREENSHOT.with_stem(f"browser-{made.layout}-{made.dtype}")
    found = CHROMIUM.generate(made.path, PROMPT, NEW_TOKENS, screenshot=picture)
    print(f"\n{made.layout} {made.dtype}: {found.decode_tokens_per_second} tokens/s; {picture}")
    return found


@pytest.mark.consumers
def test_node_generates_the_text_that_our_own_session_generates(made: Made) -> None:
    NODE.prepare()
    found = NODE.generate(made.path, PROMPT, NEW_TOKENS)
    print(f"\n{made.layout} {made.dtype}: {found.decode_tokens_per_second} tokens/s")
    assert found.text == made.reference


@pytest.mark.browser
def test_chromium_generates_and_shows_the_text_that_our_own_session_generates(made: Made) -> None:
    found = on_the_page(made)
    assert found.shown == found.text
    if made.dtype in QUANTISED:
        assert found.text[:SAME_CHARACTERS] == made.reference[:SAME_CHARACTERS]
    else:
        assert found.text == made.reference


@pytest.mark.browser
def test_the_page_needs_nothing_from_outside(made: Made) -> None:
    hosts = {urlsplit(request).hostname for request in on_the_page(made).requests}
    paths = {urlsplit(request).path for request in on_the_page(made).requests}
    assert hosts == {"127.0.0.1"}
    assert {"/page.mjs", "/worker.mjs", "/transformers/transformers.min.js"} <= paths
    assert any(path.endswith(".wasm") for path in paths)  # the workers' requests are seen, too


@pytest.mark.parametrize(
    "consumer", [pytest.param(NODE, marks=pytest.mark.consumers), pytest.param(CHROMIUM, marks=pytest.mark.browser)]
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_a_folder_in_its_own_layout_says_all_that_transformers_js_must_know(
    consumer: javascript.TransformersJs, dtype: str, tmp_path: Path
) -> None:
    source, tokens = loaded(tiny("llama")), token_rows(rows=1).tokens
    for layout in ("flat", "transformersjs"):
        options = ExportOptions(dtype=dtype, layout=layout)
        export(source, tmp_path / layout, to="onnx", options=options, check_tokens=tokens)
    consumer.prepare()
    flat, nested = (consumer.generate(tmp_path / layout, "abc", 8) for layout in ("flat", "transformersjs"))
    assert nested.tokens == flat.tokens
    assert len(nested.tokens) > 1


@pytest.mark.consumers
@pytest.mark.parametrize("damage", ["unknown", "missing"])
def test_a_tokenizer_that_it_cannot_read_is_said_in_one_line(damage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(settings | {"pre_tokenizer": {"type": "Mystery"}}))
    if damage == "missing":
        file.unlink()
    NODE.prepare()
    with pytest.raises(BackendError, match="cannot read the tokenizer of this export") as caught:
        NODE.run(tmp_path, PROMPT, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.consumers
def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    NODE.prepare()
    with pytest.raises(BackendError, match="no export"):
        NODE.run(tmp_path, PROMPT, 1)


def test_a_missing_browser_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="apt-get install chromium"):
        CHROMIUM.prepare()
    with pytest.raises(BackendError, match="install nodejs"):
        NODE.prepare()


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(javascript, "HOME", tmp_path)
    with pytest.raises(BackendError, match="make test-consumers"):
        NODE.run(tmp_path, PROMPT, 1)


def test_the_lock_file_names_no_place_to_install_from() -> None:
    lock = json.loads((javascript.SOURCES / "package-lock.json").read_text("utf-8"))
    assert all("resolved" not in package for package in lock["packages"].values())
