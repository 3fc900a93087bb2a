"""Properties of the optimizers are asked of every backend that is there."""

import pytest


@pytest.fixture(params=[None, False], ids=["fast", "plain"])
def fused(request: pytest.FixtureRequest) -> bool | None:
    """What to build an optimizer with: None takes the fastest backend for each parameter, False the plain one alone."""
    return request.param
