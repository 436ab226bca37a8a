"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import byte_tokenizer, tiny


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
