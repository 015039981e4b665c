"""Run in a process of its own by test_triton_mutation.py: checks of mutation_checks.py on changed copies of
sail_ops/triton, in Triton's interpreter. Prints what each said, as JSON.

python triton_mutants.py folder:fused_experts ...      folder has a changed triton/; "-" is the package's own
"""

import json
import sys

import mutation_checks
import triton_interpreter  # noqa: F401  (puts Triton's kernels in place of the CPU's)

import sail_ops
from sail_ops import testing


def check(folder: str, name: str) -> str:
    for module in [m for m in sys.modules if m.startswith("sail_ops.triton")]:
        del sys.modules[module]
    own = list(sail_ops.__path__)
    try:
        if folder != "-":
            sail_ops.__path__.insert(0, folder)
        return mutation_checks.run(testing.cpu_isas()[-1], name)
    finally:
        sail_ops.__path__[:] = own


if __name__ == "__main__":
    print(json.dumps({pair: check(*pair.rsplit(":", 1)) for pair in sys.argv[1:]}))
