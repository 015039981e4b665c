"""Where Triton's kernels are registered, and what a call says where they cannot be had."""

import inspect
import subprocess
import sys

import pytest
import torch

from sail_ops import _backends, _library, _triton

ONCE = pytest.mark.skipif(bool(torch.version.cuda), reason="registered by the import")
SUBPROCESS = "from sail_ops import _backends, _triton, __main__ as report; import torch, sail_ops\n"


def output(code: str) -> str:
    """Of a process of its own: a registration stays."""
    return subprocess.run([sys.executable, "-c", SUBPROCESS + code], check=True, capture_output=True, text=True).stdout


def test_signatures_are_those_of_the_schemas() -> None:
    kernels = pytest.importorskip("sail_ops.triton", reason="Triton is not installed")
    assert set(_triton.OPERATORS) == set(kernels.__all__)
    for name in _triton.OPERATORS:
        schema = getattr(torch.ops.sail_ops, name).default._schema
        assert list(inspect.signature(getattr(kernels, name)).parameters) == [a.name for a in schema.arguments]


@ONCE
def test_every_operator_without_a_compiled_kernel_gets_triton() -> None:
    said = output("_backends.TRITON = _backends.use_triton(); print(*_backends.TRITON); report.main()").splitlines()
    names = said[0].split()
    assert names == [n for n in _triton.OPERATORS if n in names] and {"fused_experts", "rms_norm"} <= set(names)
    rows = [line.split() for line in said if line.startswith(tuple(names)) and line != said[0]]
    assert {row[0] for row in rows} == set(names) and all(row[2] == "triton" for row in rows)


@ONCE
def test_triton_is_not_imported_before_its_first_call() -> None:
    assert output("import sys; _backends.use_triton(); print('triton' in sys.modules)").strip() == "False"


def test_a_call_without_triton_names_what_is_missing() -> None:
    said = output(
        "_triton.installed = lambda: False\n"
        "_triton.register(['rms_norm'], 'the CUDA library is not built', 'CPU')\n"
        "try: sail_ops.rms_norm(torch.ones(2, 8), torch.ones(8))\n"
        "except NotImplementedError as error: print(error)"
    )
    assert said.startswith("sail_ops.rms_norm: no kernel for this device: the CUDA library is not built, and Triton is")
    assert "pip install triton" in said


CARDS = [
    ("80,90a", (8, 0), True),
    ("80,90a", (8, 9), True),
    ("80,90a", (9, 0), True),
    ("80,90a", (10, 0), False),
    ("80,90a", (12, 0), False),
    ("86", (8, 0), False),
    ("100f", (10, 0), True),
    ("90a", (9, 1), False),
]


@pytest.mark.parametrize("archs, card, runs", CARDS)
def test_which_card_runs_which_code(archs: str, card: tuple[int, int], runs: bool) -> None:
    assert _triton.runs_on(archs, card) == runs


@pytest.mark.parametrize(
    "cards, asked, replaced",
    [([(9, 0)], False, False), ([(12, 0)], False, True), ([(9, 0), (12, 0)], False, False), ([], False, False)]
    + [([(9, 0)], True, True)],
)
def test_compiled_kernels_are_replaced_on_cards_without_code(
    monkeypatch: pytest.MonkeyPatch, cards: list[tuple[int, int]], asked: bool, replaced: bool
) -> None:
    monkeypatch.setattr(_library, "cuda_archs", lambda: "80,90a")
    monkeypatch.setattr(_triton, "cards", lambda: cards)
    monkeypatch.setattr(_triton, "register", lambda names, reason: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "norm" in name)
    got = _backends.use_triton(asked)
    assert "fused_experts" in got and ("rms_norm" in got) == replaced
