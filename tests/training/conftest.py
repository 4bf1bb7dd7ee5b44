"""What several tests of training need."""

from pathlib import Path

import pytest
from tests.training.train_runs import paint_photographs


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten photographs."""
    return paint_photographs(tmp_path_factory.mktemp("photographs"), 10)
