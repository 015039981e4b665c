"""One decoder layer of Qwen3-30B-A3B, forward and backward on a pack of sequences, beside transformers' own.

Ours is `sail_model`'s layer; the peer is transformers' with its defaults: `grouped_mm` experts, and SDPA under the mask
of the pack. Both hold the same weights, and gradients are fresh in every step. Every part of the layer is timed alone
too, and the peak of memory that a step adds is measured in a process of its own.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import Module
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from benchmarks import harness, liger
from benchmarks.cases import DTYPES, SIZES, size_name
from benchmarks.limits import Limits
from benchmarks.worker import Worker
from sail_model.attention import pack_of, packed_positions
from sail_model.decoder import DecoderLayer, rotary_tables

LENGTHS = {"full": (37, 256, 96, 500, 3, 132), "tiny": (3, 1, 12)}  # of the pack: 1,024 tokens
HEADS = {"full": (32, 4, 128), "tiny": (4, 2, 16)}  # query heads, key/value heads, head dim
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
BUDGET = {"full": 30.0, "tiny": 0.05}


class LayerSteps:
    """Both layers on one pack. Steps are called "sail", "transformers", and for a part "sail mlp" and so on.

    A card has "liger" too: transformers' layer with liger-kernel's norms, rotation and experts.
    """

    def __init__(self, dtype_name: str, size: str, device: str = "cpu", lengths: tuple[int, ...] = ()):
        self.config, self.dtype, lengths = layer_config(size), DTYPES[dtype_name], lengths or LENGTHS[size]
        torch.manual_seed(0)
        with torch.device(device):
            self.layers: dict[str, Module] = {"sail": DecoderLayer(self.config, 0).to(self.dtype)}
        self.weights = {name: fresh(p) for name, p in self.layers["sail"].named_parameters()}
        self.layers["sail"].load_state_dict(self.weights, assign=True)
        self.x_BLD = torch.randn(1, sum(lengths), self.config.hidden_size, device=device).to(self.dtype)
        self.x_BLD.requires_grad_()
        self.grad_BLD = torch.randn_like(self.x_BLD)
        self.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.calls = {"sail": self._ours()}

    def prepare(self, name: str) -> None:
        """Drop the gradients; make a peer's layer where it is the first time."""
        side = name.partition(" ")[0]
        if side not in self.layers:
            with liger.patched() if side == "liger" else nullcontext():
                self.layers[side] = meta_layer(self.config).to(self.dtype)
            self.layers[side].load_state_dict(self.weights, assign=True)
            self.calls[side] = self._theirs(side)
        self.x_BLD.grad = None
        for layer in self.layers.values():
            layer.zero_grad(set_to_none=True)

    def run(self, name: str) -> None:
        """One step of a layer or of a part of it."""
        side, _, part = name.partition(" ")
        with liger.patched() if side == "liger" else nullcontext():
            y = self.calls[side](part)
        y.backward(self.grad_BLD)

    def _ours(self) -> Callable[[str], Tensor]:
        layer, pack = self.layers["sail"], pack_of(self.cu_seqlens)
        rotation = rotary_tables(packed_positions(self.cu_seqlens)[None], self.config)
        whole = {"attention_mask": None, "pack": pack, "token_mask_T": None, "past_key_values": None}

        def call(part: str) -> Tensor:
            if not part:
                return layer(self.x_BLD, rotation, **whole)[0]
            if part == "self_attn":
                return layer.self_attn(self.x_BLD, rotation, None, pack, None)
            if part == "mlp":
                return layer.mlp(self.x_BLD, None)[0]
            return getattr(layer, part)(self.x_BLD)

        return call

    def _theirs(self, side: str) -> Callable[[str], Tensor]:
        layer, positions = self.layers[side], packed_positions(self.cu_seqlens)
        cos, sin = (torch.cat((t, t), -1).to(self.dtype) for t in rotary_tables(positions[None], self.config))
        tokens = torch.arange(len(positions), device=positions.device)
        sequence = torch.bucketize(tokens, self.cu_seqlens[1:], right=True)
        mask = ((sequence[:, None] == sequence) & (positions[:, None] >= positions))[None, None]
        arguments = {"attention_mask": mask, "position_embeddings": (cos, sin)}

        def call(part: str) -> Tensor:
            if not part:
                return layer(self.x_BLD, **arguments)
            if part == "self_attn":
                return layer.self_attn(self.x_BLD, **arguments)[0]
            return getattr(layer, part)(self.x_BLD)

        return call


def layer_config(size: str) -> Qwen3MoeConfig:
    s, (heads, kv_heads, head_dim) = SIZES[size], HEADS[size]
    config = Qwen3MoeConfig(
        hidden_size=s.D,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=s.E,
        num_experts_per_tok=s.K,
        moe_intermediate_size=s.F,
        norm_topk_prob=True,
        num_hidden_layers=1,
    )
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    return config


def meta_layer(config: Qwen3MoeConfig) -> Qwen3MoeDecoderLayer:
    """Without memory: the weights are assigned."""
    with torch.device("meta"):
        return Qwen3MoeDecoderLayer(config, 0)


def fresh(parameter: Tensor) -> Tensor:
    """Weights that keep the size of what goes through them; the norms' are ones."""
    if parameter.dim() == 1:
        return torch.ones_like(parameter)
    return torch.randn_like(parameter) * parameter.shape[-1] ** -0.5


@pytest.mark.parametrize("dtype", ["bf16"])
def test_decoder_layer(benchmark: BenchmarkFixture, dtype: str, limits: Limits, memory_worker: Worker) -> None:
    """The peak of memory, the parts one by one, and the whole layer."""
    size = size_name()
    memory_worker.build(LayerSteps, dtype, size)
    peaks = {}
    for name in ("sail", "transformers"):
        for _ in range(2):  # the first step also starts threads and loads code
            peaks[name] = memory_worker.call("peak_bytes", name)
    steps = LayerSteps(dtype, size)
    names = [f"{side} {part}" for part in PARTS for side in ("sail", "transformers")]
    parts = harness.alternate(steps, names, BUDGET[size])
    samples = harness.interleave(benchmark, steps, "sail", ["transformers"], budget=BUDGET[size])
    harness.record(
        benchmark,
        samples,
        family="step",
        kind="train",
        case={"layer": "Qwen3-30B-A3B", "dtype": dtype, "T": sum(LENGTHS[size]), "lengths": LENGTHS[size]},
        parts_ms={name: 1e3 * seconds for name, seconds in parts.items()},
        peak_bytes=peaks,
    )
