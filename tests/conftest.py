"""Fixtures of every test: one run per CPU instruction set of this machine."""

from collections.abc import Iterator

import pytest

from sail_ops import testing


@pytest.fixture(params=testing.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.use_isa(request.param):
        yield request.param
