"""Run in a process of its own by test_triton_compile.py: compiles every kernel of the expert layer for a card that is
not there, as the layer's own host code launches it. Prints what became of each, as JSON.

python triton_compile.py 80 bfloat16
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from expert_layer import biases, detached, layer
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

import sail_ops.triton as kernels
from sail_ops.testing import ExpertsCase
from sail_ops.triton import configs

CASE = ExpertsCase(512, 256, 128, 4, 2)  # 256 rows an expert: the largest tiles
PTXAS = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "ptxas"


class Driver:
    """Of the card that the kernels are compiled for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def spilled_bytes(ptx: str, arch: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [PTXAS, "-v", f"-arch=sm_{arch}{'a' if arch == 90 else ''}", source, "-o", source.with_suffix(".o")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def main() -> None:
    arch, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    triton.runtime.driver.set_active(Driver(arch))
    choose = configs.rows_tiles
    configs.rows_tiles = lambda _, *problem: choose(divmod(arch, 10), *problem)  # type: ignore[assignment]
    found = []

    def compile_(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants)
        ptx = compiled.asm["ptx"]
        found.append(
            {
                "name": kernel.__name__,
                "cubin": len(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "spilled": spilled_bytes(ptx, arch) if "tl.dot" in kernel.src or "multiply" in kernel.src else 0,
                "wgmma": ptx.count("wgmma.mma_async"),
                "mma": ptx.count("mma.sync"),
                "cp_async": ptx.count("cp.async.c"),
                "atomics": len(re.findall(r"\b(atom|red)\.", ptx)),
            }
        )

    KernelInterface.__getitem__ = lambda kernel, grid: partial(compile_, kernel, grid)  # type: ignore[method-assign]
    x, gate_up, down, ids, weights = detached(*layer(CASE, dtype))
    bias = detached(*biases(CASE, dtype))
    args = (gate_up, None, down, ids, weights)
    _, h = kernels.fused_experts(x, *args, *bias, 0, None, True)
    kernels.fused_experts_backward(x, x, *args, h, *bias, 0, None, 63, None, None, None)
    if arch == 80:  # the others' code does not depend on the card
        logits, (_, E) = x[:, :64].contiguous(), (0, 64)
        probs, chosen, _, _ = kernels.route_topk(logits, 4, True, None, None, None)
        kernels.route_topk_backward(probs, torch.ones(E), logits, chosen, None, True)
        kernels.add_rms_norm(x, x, x[0].contiguous(), 1e-6)
        kernels.rms_norm_backward(x, x, x, x[0].contiguous(), 1e-6, True, True)
        kernels.swiglu_backward(x, x, kernels.swiglu(x, x))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
