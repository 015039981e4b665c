"""Do the checks see a broken Triton kernel? Each mutant changes one line of sail_ops/triton and must fail its check."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from native import ROOT

pytest.importorskip("triton", reason="Triton is not installed: `pip install --no-deps -c constraints.txt triton`")
pytestmark = pytest.mark.slow


class Mutant(NamedTuple):
    """In `file`, `old` becomes `new`; `check` is of mutation_checks.py."""

    check: str
    file: str
    old: str
    new: str


MUTANTS = {
    "residual ignored": Mutant(
        "add_rms_norm",
        "kernels/norm.py",
        "            v += tl.load(residual + row * residual_stride + n, mask=n < D, other=0.0).to(tl.float32)\n",
        "",
    ),
    "gate and up swapped": Mutant("swiglu", "kernels/activation.py", "(value * u)", "(value * g)"),
    "ties to the higher id": Mutant(
        "route_topk",
        "kernels/routing.py",
        "tl.min(tl.where(key == tl.max(key, 1)[:, None], e[None, :], BE), 1)",
        "tl.max(tl.where(key == tl.max(key, 1)[:, None], e[None, :], -1), 1)",
    ),
    "end of the sum dropped": Mutant(
        "fused_experts", "kernels/gemm.py", "k_ok = k < depth - k0", "k_ok = k < depth - k0 - 1"
    ),
    "up's half of dx missing": Mutant("fused_experts", "kernels/gemm.py", "a_tile + K, b_second", "a_tile, b_second"),
    "last row missing in weight gradients": Mutant(
        "fused_experts", "kernels/gemm.py", "        ok = row < end\n", "        ok = row < end - 1\n"
    ),
    "weights of another expert": Mutant(
        "fused_experts", "kernels/moe.py", "weight_at = e * weight_expert", "weight_at = e // 2 * weight_expert"
    ),
    "routing weight missing in dh": Mutant("fused_experts", "kernels/moe.py", "        da *= weight[:, None]\n", ""),
    "up gets the gradient of gate": Mutant(
        "fused_experts", "kernels/moe.py", "dup = da * act", "dup = da * up * slope"
    ),
    "a column tile's dots missing": Mutant("fused_experts", "kernels/moe.py", "in range(parts)", "in range(parts - 1)"),
    "an expert's tiles one short": Mutant(
        "fused_experts", "kernels/rows.py", "(end - start + BM - 1) // BM", "(end - start) // BM"
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By mutant's name, and by check for the package as it is."""
    pairs = {f"none:{check}": f"-:{check}" for check in sorted({m.check for m in MUTANTS.values()})}
    for i, (name, mutant) in enumerate(MUTANTS.items()):
        folder = tmp_path_factory.mktemp(f"mutant{i}")
        shutil.copytree(ROOT / "sail_ops" / "triton", folder / "triton")
        changed = folder / "triton" / mutant.file
        text = changed.read_text()
        assert mutant.old in text, f"{mutant.file} lacks {mutant.old!r}"
        changed.write_text(text.replace(mutant.old, mutant.new))
        pairs[name] = f"{folder}:{mutant.check}"
    values = list(pairs.values())
    with ThreadPoolExecutor(2) as threads:
        answers: dict[str, str] = {}
        for part in threads.map(_run, (values[::2], values[1::2])):
            answers |= part
    return {name: answers[pair] for name, pair in pairs.items()}


def _run(pairs: list[str]) -> dict[str, str]:
    script = Path(__file__).parents[1] / "support" / "triton_mutants.py"
    done = subprocess.run([sys.executable, str(script), *pairs], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(said: dict[str, str], name: str) -> None:
    assert said[name]


@pytest.mark.parametrize("check", sorted({m.check for m in MUTANTS.values()}))
def test_checks_pass_on_the_package_as_it_is(said: dict[str, str], check: str) -> None:
    assert not said[f"none:{check}"]
