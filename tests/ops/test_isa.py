"""The choice of CPU instruction set: by cpuid, by SAIL_OPS_ISA, by sail_ops.testing.use_isa."""

import os
import subprocess
import sys

import pytest
import torch

import sail_ops
from sail_ops import _library, testing


def in_new_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SAIL_OPS_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_best_is_the_default() -> None:
    isas = testing.cpu_isas()
    assert isas[0] == "generic"
    if not os.environ.get("SAIL_OPS_ISA"):
        assert _library.cpu_isa() == isas[-1]


def test_variable_selects() -> None:
    code = "from sail_ops import _library; print(_library.cpu_isa())"
    isa = testing.cpu_isas()[0]
    assert in_new_process(code, isa).stdout.strip() == isa


def test_variable_with_a_set_the_machine_lacks_is_refused_by_every_operator() -> None:
    code = """
import torch, sail_ops
from sail_ops import _library
for call in (_library.cpu_isa, lambda: sail_ops.rms_norm(torch.ones(2, 8), torch.ones(8))):
    try:
        call()
    except ValueError as e:
        print(e)
"""
    process = in_new_process(code, "amx")
    assert process.returncode == 0, process.stderr
    message = f"SAIL_OPS_ISA: got 'amx', expected one that this machine has: {', '.join(testing.cpu_isas())}"
    assert process.stdout.splitlines() == [message, message]


def test_use_isa_is_undone(isa: str) -> None:
    assert _library.cpu_isa() == isa
    with testing.use_isa("generic"):
        assert _library.cpu_isa() == "generic"
    testing.use_isa(isa).__enter__()  # the fixture's own exit restores the default


def test_use_isa_refuses_what_the_machine_lacks() -> None:
    before = _library.cpu_isa()
    with (
        pytest.raises(ValueError, match="got 'amx', expected one that this machine has: generic"),
        testing.use_isa("amx"),
    ):
        pass
    assert _library.cpu_isa() == before


def test_instruction_sets_differ_in_rounding_only() -> None:
    x, weight = testing.random(7, 200), torch.ones(200)
    results = []
    for isa in testing.cpu_isas():
        with testing.use_isa(isa):
            results.append(sail_ops.rms_norm(x, weight))
    for r in results[1:]:
        torch.testing.assert_close(r, results[0])
