"""One training step of every operator at small, odd sizes: what compute-sanitizer watches (tests/gpu/check.py)."""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from expert_layer import biases, layer, offsets

import sail_ops
from sail_ops import testing
from sail_ops.testing import ExpertsCase

CASES = [ExpertsCase(67, 72, 40, 5, 2, "dropped"), ExpertsCase(33, 77, 33, 4, 4), ExpertsCase(0, 64, 32, 4, 2)]
# B, S, L, H, G, A: tails of both tiles, rows that see no key, few queries (split over the keys), none
ATTENTION = [(1, 67, 131, 4, 2, 72), (2, 131, 67, 2, 1, 128), (2, 3, 600, 8, 2, 80), (1, 0, 5, 2, 1, 64)]
PACK = [(37, 37), (0, 5), (1, 1), (5, 0), (70, 90)]


def leaf(t: Tensor, device: str) -> Tensor:
    return t.detach().to(device).requires_grad_()


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    return leaf(testing.random(*shape, dtype=torch.bfloat16, seed=seed), device)


def backward(*results: Tensor) -> None:
    torch.stack([r.float().sum() for r in results]).sum().backward()


def experts(device: str) -> None:
    for case in CASES:
        args = [t.detach().to(device).requires_grad_(t.is_floating_point()) for t in layer(case, torch.bfloat16)]
        bias = [leaf(b, device) for b in biases(case, torch.bfloat16)]
        for recompute in (False, True):
            backward(sail_ops.fused_experts(*args, biases=tuple(bias), recompute=recompute))
    x, w = random(67, 72, device=device), random(5, 72, 40, device=device)
    ends = offsets(9, 0, 30, 1, 20).to(device)
    for weight in (w, leaf(w.transpose(1, 2).contiguous().transpose(1, 2), device)):
        backward(sail_ops.grouped_mm(x, weight, ends))
    routing = sail_ops.route_topk(x, 3, renormalize=True)
    backward(routing.weights_TK, routing.prob_sum_E)


def attention(device: str) -> None:
    for B, S, L, H, G, A in ATTENTION:
        q, k, v = (random(B, n, h, A, device=device, seed=i) for i, (n, h) in enumerate([(S, H), (L, G), (L, G)]))
        for causal in (False, True):
            out, lse = sail_ops.attention(q, k, v, causal=causal, return_lse=True)
            backward(out, lse.masked_fill(lse == -torch.inf, 0))
    lengths = list(zip(*PACK, strict=True))
    cu_q, cu_k = (offsets(0, *n).to(device) for n in lengths)
    q, k, v = (random(sum(n), h, 64, device=device) for n, h in zip((*lengths, lengths[1]), (4, 2, 2), strict=True))
    backward(sail_ops.attention_varlen(q, k, v, cu_q, cu_k, *map(max, lengths), causal=True))


def norms(device: str) -> None:
    for columns in (72, 77, 8200):
        x, residual = (random(19, columns, device=device, seed=s) for s in (0, 1))
        weight, bias = (random(columns, device=device, seed=s) for s in (2, 3))
        backward(sail_ops.rms_norm(x, weight), *sail_ops.add_rms_norm(x, residual, weight))
        backward(sail_ops.layer_norm(x, weight, bias), *sail_ops.add_layer_norm(x, residual, weight, bias))
        backward(sail_ops.swiglu(x, residual))


def rotation(device: str) -> None:
    for A in (64, 70):
        q, k = random(2, 19, 7, A, device=device), random(2, 19, 2, A, device=device)
        weights = [random(A, device=device, seed=s) for s in (2, 3)]
        table = testing.random(30, A).to(device)
        positions = (torch.arange(19) + 7).to(device)
        backward(*sail_ops.rope(q, k, table[:19], table[:19]))
        backward(*sail_ops.qk_norm_rope(q, k, *weights, table, table, positions=positions))


def loss(device: str) -> None:
    hidden, lm_head = random(150, 40, device=device), random(1029, 40, device=device, seed=1)
    labels = (torch.arange(150) * 7 % 1029).to(device)
    labels[::3] = -100
    for reduction in ("mean", "none"):
        backward(sail_ops.linear_cross_entropy(hidden, lm_head, labels, reduction=reduction))


STEPS = {f.__name__: f for f in (experts, attention, norms, rotation, loss)}

if __name__ == "__main__":
    for step in STEPS.values():
        step("cuda")
    torch.cuda.synchronize()
    print("ran")
