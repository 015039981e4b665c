"""SAIL-VL2 against transformers: InternVL with an AIMv2 encoder and Qwen3 or Qwen3-MoE, same weights, both ways.

The accuracy rule holds our error against fp64 to twice that of transformers in the same dtype, for logits and for the
gradients of every layer. The fp64 run is transformers' too, with the casts to fp32 inside its norms and routers taken
out.
"""

import re
import types
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tiny_model import IMAGE, PAD, lively_model, one_thread, pixels, prompt, tiny_config
from torch import Tensor, nn

from benchmarks.stock import State, stock_key, stock_model, to_stock
from sail_model import SailVL2Config, SailVL2ForConditionalGeneration
from sail_ops.testing import assert_accurate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def from_reference(state: State, like: State) -> State:
    """transformers' names and layouts -> ours, for the keys of `like`."""
    mapped = {}
    for key in like:
        if key.endswith("attn.qkv.weight"):
            stem = stock_key(key.removesuffix("attn.qkv.weight"))
            mapped[key] = torch.cat([state[f"{stem}attention.{name}_proj.weight"] for name in "qkv"])
        else:
            value = state[stock_key(key)]
            mapped[key] = value[None] if key.endswith("pos_embed") else value
    return mapped


def reference_model(config: SailVL2Config, state: State, dtype: torch.dtype) -> nn.Module:
    """transformers' model with our weights."""
    model = stock_model(config, state)
    model.set_experts_implementation("eager")
    return widen(model.double()) if dtype == torch.float64 else model.to(dtype)


def widen(model: nn.Module) -> nn.Module:
    """Take the casts to fp32 out of norms and routers."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def route(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        weights, ids = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(route, module)
    return model


class Batch(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor


def make_batch(padding: str) -> Batch:
    """Three prompts of different lengths: three tiles, one tile, no picture."""
    words = (9, 17, 21) if padding == "none" else (9, 12, 17)
    rows = [prompt(tiles, n, seed=n) for tiles, n in zip((3, 1, 0), words, strict=True)]
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        sides = (gap, 0) if padding == "left" else (0, gap)
        ids.append(F.pad(row, sides, value=PAD))
        mask.append(F.pad(torch.ones_like(row), sides))
    stacked = torch.stack(ids)
    return Batch(stacked, torch.stack(mask), pixels(int((stacked == IMAGE).sum()) // 4))


def logits_and_gradients(model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, State]:
    """Logits at the real tokens, and the gradient that a fixed random cotangent gives each parameter."""
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values.to(dtype),
        use_cache=False,
    )
    logits = out.logits[batch.attention_mask.bool()]
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    model.zero_grad()
    logits.backward(cotangent)
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layers(gradients: State, exact: State) -> State:
    """One vector for each layer: its gradients, each in units of the RMS of the exact one.

    Weights of a few dozen elements have errors of few degrees of freedom: one by one they break the rule by chance.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        layer = re.search(r"(vision_model|language_model).*(blocks|layers)\.\d+|[^.]*", name)[0]
        scale = exact[name].square().mean().sqrt()
        parts.setdefault(layer, []).append(gradient.double().flatten() / scale)
    return {layer: torch.cat(vectors) for layer, vectors in parts.items()}


def compare(ours: SailVL2ForConditionalGeneration, swapped: bool, dtype: torch.dtype, padding: str) -> None:
    """Hold logits and gradients to the accuracy rule. `swapped`: ViT gate and up are exchanged on the way."""
    state = {key: value.to(dtype) for key, value in ours.state_dict().items()}
    theirs = {re.sub(r"fc([13])", lambda m: f"fc{4 - int(m[1])}", k) if swapped else k: v for k, v in state.items()}
    batch = make_batch(padding)
    logits, gradients = logits_and_gradients(ours.to(dtype), batch, dtype)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    exact_model, base_model = (reference_model(ours.config, theirs, d) for d in (torch.float64, dtype))
    exact, exact_gradients = logits_and_gradients(exact_model, batch, torch.float64)
    base, base_gradients = logits_and_gradients(base_model, batch, dtype)
    assert exact.std() > 0.5, "logits are too small to show an error"
    # pooled: over a whole model, the errors of one row are too alike to average out
    assert_accurate(logits.flatten(), exact.flatten(), base.flatten(), name="logits")
    exact_gradients = from_reference(exact_gradients, gradients)
    base_gradients = from_reference(base_gradients, gradients)
    ours_by_layer, exact_by_layer, base_by_layer = (
        layers(each, exact_gradients) for each in (gradients, exact_gradients, base_gradients)
    )
    for layer, vector in ours_by_layer.items():
        assert_accurate(vector, exact_by_layer[layer], base_by_layer[layer], name=f"gradients of {layer}")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_parity_fp32(moe: bool, padding: str) -> None:
    compare(lively_model(tiny_config(moe)), False, torch.float32, padding)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_parity_bf16(moe: bool, padding: str) -> None:
    """All experts are chosen: with fewer, two runs that round differently would choose differently at near ties."""
    config = tiny_config(moe, num_experts_per_tok=8) if moe else tiny_config(moe)
    compare(lively_model(config), False, torch.bfloat16, padding)


def test_parity_tied_embeddings() -> None:
    compare(lively_model(tiny_config(False, tie_word_embeddings=True)), False, torch.float32, "left")


def test_parity_without_renormalized_weights_or_with_dense_layers() -> None:
    config = tiny_config(True, norm_topk_prob=True, mlp_only_layers=[1], decoder_sparse_step=1)
    compare(lively_model(config), False, torch.float32, "left")


def test_swapped_gate_and_up_fail() -> None:
    """Negative control: the rule sees the smallest structural error of the encoder."""
    with pytest.raises(AssertionError, match="worst element"):
        compare(lively_model(tiny_config(False)), True, torch.float32, "left")


def test_weights_map_both_ways() -> None:
    state = lively_model(tiny_config(True)).state_dict()
    back = from_reference(to_stock(state), state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    SailVL2ForConditionalGeneration(tiny_config(True)).load_state_dict(back, strict=True)
