"""Triton's kernels compiled for cards that are not there: tensor cores, asynchronous copies, spills, shared memory."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: `pip install --no-deps -c constraints.txt triton`")

pytestmark = pytest.mark.slow

PRODUCTS = {"up_kernel": 1, "gemm_kernel": 2, "activation_gradient_kernel": 1, "weight_gradient_kernel": 3}
SMALL_SHARED = 99 * 1024  # a block's on sm_86, sm_89 and sm_120
CARDS = [(80, "bfloat16"), (80, "float16"), (90, "bfloat16"), (90, "float16"), (86, "bfloat16")]
Kernels = list[dict]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Kernels]:
    cache = str(tmp_path_factory.mktemp("triton"))

    def compile_for(card: tuple[int, str]) -> Kernels:
        script = Path(__file__).parents[1] / "support" / "triton_compile.py"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, str(script), *map(str, card)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(CARDS, threads.map(compile_for, CARDS), strict=True))


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_products_use_the_tensor_cores_and_spill_nothing(compiled: dict, card: tuple[int, str]) -> None:
    products = [k for k in compiled[card] if k["name"] in PRODUCTS]
    names = [k["name"] for k in products]
    assert {name: names.count(name) for name in PRODUCTS} == PRODUCTS
    instruction, other = ("wgmma", "mma") if card[0] == 90 else ("mma", "wgmma")
    for kernel in products:
        assert kernel["cubin"] and kernel[instruction] and not kernel[other] and kernel["cp_async"], kernel
        assert not kernel["spilled"], kernel


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_no_kernel_uses_atomics(compiled: dict, card: tuple[int, str]) -> None:
    assert all(k["cubin"] and not k["atomics"] for k in compiled[card])


def test_small_cards_have_the_shared_memory(compiled: dict) -> None:
    used = [k["shared"] for k in compiled[86, "bfloat16"]]
    assert 0 < max(used) <= SMALL_SHARED
