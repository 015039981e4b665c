"""Configurations: SAIL-ViT, the vision-language model, and the released zoo.

The text model keeps transformers' own `Qwen3Config` and `Qwen3MoeConfig`: its fields mean what they mean there.
A field that the code does not implement is refused here, so that no setting is ever ignored in silence.
Sources: SAIL-VL2 report (arXiv 2509.14033), Table 1 and section 2; config.json of the released 2B model.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class SailViTConfig(PreTrainedConfig):
    """SAIL-ViT at a fixed resolution; the defaults are SAIL-ViT-Huge.

    Fields: `hidden_size` C, `intermediate_size` of the SwiGLU, `num_hidden_layers`, `num_attention_heads`,
    `num_channels`, square `image_size` and `patch_size` in pixels, `rms_norm_eps`. `qkv_bias`, `use_bias` and the
    dropouts are fields of the released config that every released model leaves off; other values raise ValueError.
    """

    model_type = "sailvit"
    base_config_key = "vision_config"

    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    use_bias: bool = False
    attention_dropout: float | int = 0.0
    projection_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        off = dict(qkv_bias=False, use_bias=False, attention_dropout=0, projection_dropout=0)
        _require("SailViTConfig", self, off)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"SailViTConfig: image_size={self.image_size} must be a multiple of patch_size={self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"SailViTConfig: hidden_size={self.hidden_size} must be a multiple of"
                f" num_attention_heads={self.num_attention_heads}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@strict
class SailVL2Config(PreTrainedConfig):
    """SAIL-ViT + pixel shuffle + two-layer MLP + Qwen3 or Qwen3-MoE.

    `text_config` is a Qwen3Config or Qwen3MoeConfig (or a dict with its `model_type`), `vision_config` a
    SailViTConfig. `image_token_id` marks the positions that image features take, `downsample_ratio` is the pixel
    shuffle's (0.5: 2x2 patches become one token). `ps_version` "v2" and `select_layer` -1 are what every released
    model uses; other values raise ValueError. `tie_word_embeddings` follows the text config, and fresh weights of
    all parts follow the text config's `initializer_range`.
    """

    model_type = "sail_vl2"
    sub_configs = {"vision_config": SailViTConfig, "text_config": AutoConfig}
    # what the Trainer's evaluation leaves out of the predictions: their first dimension is not the batch
    keys_to_ignore_at_inference = [
        *("past_key_values", "image_hidden_states", "counts_ME", "prob_sum_ME", "num_tokens"),
        *("aux_loss", "router_logits", "expert_ids_MTK"),
    ]

    vision_config: Any = None  # given as a dict, a config or None; a SailViTConfig from then on
    text_config: Any = None  # likewise a Qwen3Config or Qwen3MoeConfig
    image_token_id: int = 151671
    downsample_ratio: float = 0.5
    ps_version: str = "v2"
    select_layer: int = -1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = SailViTConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "qwen3"} | (self.text_config or {}))
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        _require("SailVL2Config", self, dict(ps_version="v2", select_layer=-1))
        _check_text_config(self.text_config)
        if self.shuffle_factor * self.downsample_ratio != 1 or self.vision_config.grid_size % self.shuffle_factor:
            raise ValueError(
                f"SailVL2Config: downsample_ratio={self.downsample_ratio} must be 1/n with n dividing the"
                f" {self.vision_config.grid_size} patches along a tile"
            )

    @property
    def shuffle_factor(self) -> int:
        """Patches along one side of the square that pixel shuffle merges into one token."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that the language model sees for one tile: 256 in every released model."""
        return (self.vision_config.grid_size // self.shuffle_factor) ** 2

    @classmethod
    def from_preset(cls, name: str) -> "SailVL2Config":
        """The configuration of one model of the zoo; `PRESETS` lists the names. Unknown names raise ValueError."""
        if name not in PRESETS:
            raise ValueError(f"SailVL2Config.from_preset: no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(vision_config=dict(SAIL_VIT_HUGE), text_config=_QWEN3_COMMON | PRESETS[name])


def is_moe_layer(text_config: PreTrainedConfig, layer_idx: int) -> bool:
    """Whether decoder layer `layer_idx` has experts, by Qwen3-MoE's rule."""
    return (
        text_config.model_type == "qwen3_moe"
        and layer_idx not in text_config.mlp_only_layers
        and text_config.num_experts > 0
        and (layer_idx + 1) % text_config.decoder_sparse_step == 0
    )


def _check_text_config(config: PreTrainedConfig) -> None:
    if config.model_type not in ("qwen3", "qwen3_moe"):
        raise ValueError(
            f"SailVL2Config: text_config.model_type must be 'qwen3' or 'qwen3_moe', not {config.model_type!r}"
        )
    wanted = dict(hidden_act="silu", attention_bias=False, attention_dropout=0, sliding_window=None)
    _require("SailVL2Config: text_config", config, wanted)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        raise ValueError(f"SailVL2Config: text_config rope_type must be 'default', not {rope_type!r}")


def _require(owner: str, config: PreTrainedConfig, wanted: dict[str, Any]) -> None:
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ValueError(f"{owner}: {field}={getattr(config, field)!r} is not implemented, only {value!r}")


SAIL_VIT_HUGE = dict(hidden_size=1536, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=12)

# AIMv2-Large's sizes, which are also the released class defaults; no SAIL-ViT-Large config was published.
SAIL_VIT_LARGE = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8)

_QWEN3_COMMON = dict(
    vocab_size=151936,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    pad_token_id=151643,
    eos_token_id=151645,
)

PRESETS: dict[str, dict[str, Any]] = {
    # Named in the report without a configuration: Qwen3-0.6B and the Huge encoder are inferred from its size.
    "SAIL-VL2-1B": dict(
        model_type="qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "SAIL-VL2-2B": dict(
        model_type="qwen3",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "SAIL-VL2-8B": dict(
        model_type="qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "SAIL-VL2-30B-A3B": dict(
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
