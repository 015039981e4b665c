"""Fixtures of every test. SAIL_TEST_DEVICE says what runs the operators:
cpu (default): one run per CPU instruction set of this machine;  emulated: the CUDA sources on the emulator
(emulated_library.py);  cuda: the CUDA library, tensors being made on the device."""

import os
import sys
from collections.abc import Iterator
from unittest.mock import patch

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: one's waiting threads would spin on another's core
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from refusals import judge_public_operators

from sail_ops import testing

# the same examples every time: a shape on the edge of the accuracy rule must not fail one run in many
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

DEVICE = os.environ.get("SAIL_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    os.environ["SAIL_OPS_CHECK"] = "1"  # bad values raise as on the CPU


def make_everything_on(device: str) -> None:
    """Every tensor and random number of the tests, those made at import too."""

    class Generator(torch.Generator):  # a class still: torch's modules name it in annotations as they are imported
        def __new__(cls, device: str = device) -> "Generator":
            return super().__new__(cls, device)

    torch.set_default_device(device)
    torch.Generator = Generator  # type: ignore[misc]


if DEVICE == "cuda":
    make_everything_on("cuda")
if DEVICE != "cpu":
    judge_public_operators(None if DEVICE == "cuda" else "cuda")  # before a test module takes one


@pytest.fixture(params=testing.cpu_isas() if DEVICE == "cpu" else [DEVICE])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if DEVICE != "cpu":
        yield request.param
        return
    with testing.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if DEVICE == "emulated":
        from emulated_library import emulated

        with emulated():
            yield
    else:
        yield
    # the judged operators are one function to torch's compiler, which compiles one for eight kinds of calls at most
    if DEVICE != "cpu" and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # files with slow tests first: the last one would leave the other processes idle
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if DEVICE != "cpu" and item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip("of the CPU's implementation alone"))


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Training's one process is all there are, on the CPU; what it sets for that in the environment goes with it."""
    from tiny_model import one_thread

    from training import parallel

    with patch.dict(os.environ), one_thread():
        parallel.start_processes("cpu")
        yield
        parallel.stop_processes()
