"""SAIL-ViT at a fixed resolution: one tile of pixels in, one feature per patch out.

N tiles, P patches of a tile (row by row), C hidden. Patches -> RMSNorm -> + learned positions -> blocks -> RMSNorm.
Bidirectional attention, SwiGLU, no class token, no rotary embedding. Modules carry the released state-dict names.
Source: SAIL-VL2 report section 2.1 and the released 2B model; the encoder is AIMv2 (arXiv 2411.14402).
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import sail_ops

from .config import SailViTConfig
from .layers import Linear, RMSNorm, residual_linear


class SailViT(nn.Module):
    """pixels [N, 3, image_size, image_size] -> features [N, P, C]. Other picture sizes raise ValueError."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.trunk(self.preprocessor(pixel_values))


class Preprocessor(nn.Module):
    """Patch embedding plus learned absolute positions."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.tile_shape = (config.num_channels, config.image_size, config.image_size)
        self.patchifier = Patchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid_size**2, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != self.tile_shape:
            wanted = ", ".join(map(str, self.tile_shape))
            raise ValueError(f"SailViT: pixel_values has shape {list(pixel_values.shape)}, wanted [tiles, {wanted}]")
        return self.patchifier(pixel_values) + self.pos_embed


class Patchifier(nn.Module):
    """Non-overlapping convolution, then RMSNorm."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norm(self.proj(pixel_values).flatten(2).transpose(1, 2).contiguous())


class Trunk(nn.Module):
    """The transformer blocks and the norm after them."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_NPC: Tensor) -> Tensor:
        for block in self.blocks:
            x_NPC = block(x_NPC)
        return self.post_trunk_norm(x_NPC)


class Block(GradientCheckpointingLayer):
    """x + attn(norm_1(x)), then x + mlp(norm_2(x))."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_NPC: Tensor) -> Tensor:
        normed, x_NPC = self.norm_2.add(self.attn(self.norm_1(x_NPC)), x_NPC)
        return x_NPC + self.mlp(normed)


class Attention(nn.Module):
    """Bidirectional multi-head attention over the patches of a tile, q/k/v from one projection."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = residual_linear(config.hidden_size, config.hidden_size, config.num_hidden_layers)

    def forward(self, x_NPC: Tensor) -> Tensor:
        qkv = self.qkv(x_NPC).unflatten(-1, (3, self.num_heads, -1))
        out_NPHA = sail_ops.attention(*qkv.unbind(2))
        return self.proj(out_NPHA.flatten(2))


class SwiGLU(nn.Module):
    """fc2(silu(fc1(x)) * fc3(x))."""

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = residual_linear(config.intermediate_size, config.hidden_size, config.num_hidden_layers)
        self.fc3 = Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(sail_ops.swiglu(self.fc1(x), self.fc3(x)))
