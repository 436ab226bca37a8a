"""What an export costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export_cost import cost, main, write
from compress.errors import ConfigError
from exporters.onnx_session import MODEL_FILE
from tests.conftest import byte_tokenizer, tiny


def test_an_export_takes_time_and_memory_and_leaves_nothing(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "hf")
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    found = cost("ours", tmp_path / "hf", "fp32")
    assert min(found.values()) > 0
    write(str(tmp_path / "hf"), str(tmp_path / "out"), "fp32")
    assert (tmp_path / "out" / MODEL_FILE).is_file()


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="ended with code"):
        cost("ours", tmp_path, "fp32")
