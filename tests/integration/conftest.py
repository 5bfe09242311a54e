"""What several modules of tests need."""

import pytest

from tests.slow_models import SlowModels, slow_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SlowModels:
    """A model repository of the module's own, which can be slowed down."""
    return slow_models(tmp_path_factory.mktemp("models"))
