"""Fixtures of the tests of training."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from tiny_model import one_thread

from training import parallel


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """One process is all there are, on the CPU; what it sets for that in the environment goes with it."""
    with patch.dict(os.environ), one_thread():
        parallel.start_processes("cpu")
        yield
        parallel.stop_processes()
