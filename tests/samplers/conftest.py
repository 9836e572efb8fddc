from __future__ import annotations

from collections.abc import Iterator

import optuna
import pytest

from tests.samplers.subjects import FACTORIES
from tests.samplers.subjects import SamplerFactory


@pytest.fixture(params=FACTORIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(name: str) -> SamplerFactory:
    """Makes the sampler under test; takes its keyword arguments."""
    return FACTORIES[name]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)
