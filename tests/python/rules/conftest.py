"""The tiny models, saved once for all tests here."""

from __future__ import annotations

from pathlib import Path

import models
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a model, each a checkpoint of several files beside its `config.json`."""
    made = tmp_path_factory.mktemp("models")
    for name in models.MODELS:
        models.save(name, made / name)
    return made
