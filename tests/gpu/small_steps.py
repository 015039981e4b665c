"""One training step of every operator at small, odd sizes: what compute-sanitizer watches (tests/gpu/check.py)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from expert_layer import biases, layer, offsets

import sail_ops
from sail_ops import testing
from sail_ops.testing import ExpertsCase

CASES = [ExpertsCase(67, 72, 40, 5, 2, "dropped"), ExpertsCase(33, 77, 33, 4, 4), ExpertsCase(0, 64, 32, 4, 2)]

for case in CASES:
    args = [t.detach().cuda().requires_grad_(t.is_floating_point()) for t in layer(case, torch.bfloat16)]
    bias = [b.detach().cuda().requires_grad_() for b in biases(case, torch.bfloat16)]
    for recompute in (False, True):
        sail_ops.fused_experts(*args, biases=tuple(bias), recompute=recompute).float().sum().backward()
x = testing.random(67, 72, dtype=torch.bfloat16).cuda().requires_grad_()
w = testing.random(5, 72, 40, dtype=torch.bfloat16).cuda().requires_grad_()
ends = offsets(9, 0, 30, 1, 20).cuda()
for weight in (w, w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()):
    sail_ops.grouped_mm(x, weight, ends).float().sum().backward()
routing = sail_ops.route_topk(x, 3, renormalize=True)
(routing.weights_TK.sum() + routing.prob_sum_E.sum()).backward()
sail_ops.swiglu(x, x).float().sum().backward()
sail_ops.rms_norm(x, x[0]).float().sum().backward()
torch.cuda.synchronize()
print("ran")
