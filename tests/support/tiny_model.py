"""Small SAIL-VL2 models for tests: two vision and three decoder layers, four image tokens a tile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sail_ops
from sail_model import SailVL2Config, SailVL2ForConditionalGeneration
from sail_ops import reference

IMAGE, PAD, EOS = 299, 0, 1
VOCAB = 300
TILE = 56  # pixels: 4 x 4 patches, so 2 x 2 image tokens


def tiny_config(moe: bool, **text: Any) -> SailVL2Config:
    """A dense or mixture-of-experts model; `text` overrides fields of the text config."""
    fields: dict[str, Any] = dict(
        model_type="qwen3_moe" if moe else "qwen3",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    if moe:
        fields |= dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
    vision = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=TILE, patch_size=14
    )
    return SailVL2Config(vision_config=vision, text_config=fields | text, image_token_id=IMAGE)


def lively_model(config: SailVL2Config, seed: int = 0) -> SailVL2ForConditionalGeneration:
    """A model whose every weight matters to its output: unit gain everywhere, nothing at its initial zero or one."""
    model = SailVL2ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or name == "mlp1.0.weight":
            noise = 1 + 0.2 * noise
        elif weight.dim() > 1 and "embed" not in name:
            fan_in = weight[0].numel() if weight.dim() != 3 else weight.shape[-1]
            noise = noise / fan_in**0.5
        weight.data = noise
    model.tie_weights()
    return model.eval()


def prompt(tiles: int, words: int, seed: int) -> Tensor:
    """ids [L]: two words, the image tokens of `tiles` tiles, then the rest of `words` random words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, IMAGE, (words,), generator=generator)
    return torch.cat([ids[:2], torch.full((4 * tiles,), IMAGE), ids[2:]])


def pixels(tiles: int, seed: int = 7) -> Tensor:
    return torch.randn(tiles, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))


@contextmanager
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits: seconds of it, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def exact_ops() -> Iterator[None]:
    """`sail_ops` is its own reference inside the block, so that a model can run in fp64."""
    norms = ("rms_norm", "add_rms_norm", "layer_norm", "qk_norm_rope")
    names = (*norms, "attention", "attention_varlen", "swiglu", "route_topk", "fused_experts")
    names += ("linear_cross_entropy",)
    with patch.multiple(sail_ops, **{name: getattr(reference, name) for name in names}):
        yield
