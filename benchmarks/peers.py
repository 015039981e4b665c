"""What sail_ops.fused_experts is compared with: expert layers on the same weights, each with its name in the tables."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import sail_ops

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, D], ids [T, K], weights [T, K] -> y [T, D]

OURS = ("sail", "sail_recompute", "sail_fp32_grads", "sail_overwrite", "sail_cluster")

# sail, sail_recompute, sail_fp32_grads  fused_experts: as it comes, with recompute, with main_grads in fp32
# sail_overwrite                         with main_grads overwritten, as in a step's first micro-batch
# sail_cluster                           with blocks in clusters, on Hopper; set by whoever times it (bench_moe_cuda.py)
# grouped_mm                             transformers' default implementation
# grouped_mm_compiled                    the same through torch.compile
# liger                                  liger-kernel's fused expert layer, in Triton
# stock_eager                            transformers' eager loop
# eager_unbind                           the same loop on W.unbind(0)


def build(
    name: str, gate_up_E2FD: Tensor, down_EDF: Tensor, main_grads: tuple[Tensor, Tensor] | None = None
) -> Experts:
    """The expert layer `name` over two weights; `main_grads` is for ours, the others accumulate in `.grad`."""
    if name == "eager_unbind":
        return lambda x, ids, weights: eager_unbind(x, gate_up_E2FD, down_EDF, ids, weights)
    if name == "grouped_mm_compiled":
        torch.compiler.reset()  # after eight shapes of one module's code it would silently run uncompiled
        return torch.compile(transformers_experts("grouped_mm", gate_up_E2FD, down_EDF))
    if name == "liger":
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return lambda x, ids, weights: LigerFusedMoEFunction.apply(x, gate_up_E2FD, down_EDF, ids.int(), weights)
    if name in ("grouped_mm", "stock_eager"):
        return transformers_experts("eager" if name == "stock_eager" else name, gate_up_E2FD, down_EDF)
    if name not in OURS:
        raise ValueError(f"peers.build: name: got {name!r}, expected a peer or one of {', '.join(OURS)}")
    return lambda x, ids, weights: sail_ops.fused_experts(
        x,
        gate_up_E2FD,
        down_EDF,
        ids,
        weights,
        recompute=name == "sail_recompute",
        main_grads=main_grads,
        accumulate=name != "sail_overwrite",
    )


def transformers_experts(implementation: str, gate_up_E2FD: Tensor, down_EDF: Tensor) -> torch.nn.Module:
    """Qwen3-MoE's expert module as transformers ships it, on our weights."""
    experts, hidden, width = down_EDF.shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = gate_up_E2FD, down_EDF
    return module


def eager_unbind(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The eager loop, done fairly: W.unbind(0) instead of W[e], and one sort instead of a search per expert.

    Each W[e] of the stock loop builds a zero gradient of W's full size in the backward pass; unbind's builds dW once.
    """
    order = ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=down_EDF.shape[0]).tolist()
    out_TD = torch.zeros_like(x_TD)
    rows_w = weights_TK.flatten()[order].split(counts)
    parts = zip(gate_up_E2FD.unbind(0), down_EDF.unbind(0), order.split(counts), rows_w, strict=True)
    for gate_up, down, rows, w in parts:
        if rows.numel() == 0:
            continue
        token = rows // ids_TK.shape[1]
        gate, up = F.linear(x_TD[token], gate_up).chunk(2, -1)
        out_TD.index_add_(0, token, F.linear(F.silu(gate) * up, down) * w[:, None])
    return out_TD
