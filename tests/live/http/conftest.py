"""The text side of a small checkpoint, for all tests of a file."""

import pytest

from orchestrator.live.text.models import ModelText
from tests.live.scripted import make_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"))
