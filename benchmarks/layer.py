"""One expert layer under measurement: its tensors, and one step of any implementation on them."""

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import DTYPES, SIZES, MoeCase, draw_routings

POOL = 16  # routings that steps take in turn: at T = 1, K = 8 they cover all 128 experts once


@lru_cache(maxsize=1)  # the rows of one dtype share them; a second set would not fit beside them in fp32
def layer_weights(dtype: str, size: str, device: str) -> tuple[Tensor, Tensor]:
    """(gate_up [E, 2F, D], down [E, D, F]): windows of one random vector, as 600 M random numbers take seconds."""
    s, generator = SIZES[size], torch.Generator().manual_seed(1)
    noise = torch.randn(2 * s.F * s.D + 64 * s.E, generator=generator).to(device)

    def windows(rows: int, cols: int) -> Tensor:
        out = torch.empty(s.E, rows, cols, dtype=DTYPES[dtype], device=device)
        for e in range(s.E):
            out[e] = noise[64 * e : 64 * e + rows * cols].view(rows, cols) * cols**-0.5
        return out

    return windows(2 * s.F, s.D), windows(s.D, s.F)


class Layer:
    """The tensors of a case. `prepare(name)` is not timed, `run(name)` is."""

    def __init__(self, case: MoeCase):
        self.case, dtype, s = case, DTYPES[case.dtype], case.sizes
        generator = torch.Generator().manual_seed(2)
        train = case.mode == "train"
        gate_up, down = layer_weights(case.dtype, case.size, case.device)
        self.weights = (torch.nn.Parameter(gate_up, requires_grad=train), torch.nn.Parameter(down, requires_grad=train))
        self.x_TD = torch.randn(case.T, s.D, generator=generator).to(case.device, dtype).requires_grad_(train)
        self.grad_TD = torch.randn(case.T, s.D, generator=generator).to(case.device, dtype)
        self.ids = [ids.to(case.device) for ids in draw_routings(case, POOL if case.T <= 16 else 1)]
        routing_TK = torch.rand(case.T, s.K, generator=generator).softmax(-1)
        self.routing_TK = routing_TK.to(case.device, dtype).requires_grad_(train)
        self.hit = sum(ids.unique().numel() for ids in self.ids) / len(self.ids)
        self.layers: dict[str, peers.Experts] = {}
        self.buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self.step = 0

    def prepare(self, name: str) -> None:
        """Gradients dropped, or with dW in place their buffers attached; the next routing taken."""
        self.step += 1
        self.x_TD.grad = self.routing_TK.grad = None
        buffers = self._buffers(name) if self.case.gradients == "in_place" else None
        ours = name.startswith("sail")
        for i, weight in enumerate(self.weights):
            weight.grad = None if ours or buffers is None else buffers[i]
        if name not in self.layers:
            self.layers[name] = peers.build(name, *self.weights, buffers)

    def forward(self, name: str) -> Tensor:
        """y [T, D]."""
        turn = self.step + self.step // POOL  # shifts, so that each of the alternating names meets every routing
        ids_TK = self.ids[turn % len(self.ids)]
        return self.layers[name](self.x_TD, ids_TK, self.routing_TK)

    def run(self, name: str) -> None:
        """One timed step: forward, and in training backward for x, both weights and the routing weights."""
        if self.case.mode == "train":
            self.forward(name).backward(self.grad_TD)
        else:
            with torch.no_grad():
                self.forward(name)

    def _buffers(self, name: str) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if name == "sail_fp32_grads" else DTYPES[self.case.dtype]
        if dtype not in self.buffers:
            gate_up, down = self.weights
            self.buffers[dtype] = torch.zeros_like(gate_up, dtype=dtype), torch.zeros_like(down, dtype=dtype)
        return self.buffers[dtype]
