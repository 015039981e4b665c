"""What `make gpu-check` does before a card matters: how the tests' tensors get there."""

import subprocess
import sys
from pathlib import Path

CODE = """
import conftest, torch
conftest.make_everything_on("cpu")
from sail_ops import swiglu, testing
x, y = (testing.random(5, 64, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(2))
assert torch.Generator(device="cpu").manual_seed(1).device == torch.Generator().device == torch.device("cpu")
testing.check_traceable(swiglu, x, y)
torch.library.opcheck(torch.ops.sail_ops.swiglu.default, (x.detach(), y.detach()))
torch.utils.checkpoint.checkpoint(swiglu, x, y, use_reentrant=False).sum().backward()
print("traced")
"""


def test_torch_traces_with_generators_of_another_device() -> None:
    """torch imports its compiler when it is first asked for, and that names torch.Generator in annotations."""
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.stdout == "traced\n", result.stderr
