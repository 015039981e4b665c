"""Tiny random models of any transformers family, and inputs for them: field names say what a size means."""

import copy
import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

VOCAB, TEXT, WIDE = 96, 9, 64  # tokens known, tokens of an input, a window that all of them are in

# The first pattern that a configuration's field matches whole says its value.
TINY: dict[str, int] = {
    r"vocab_size|\w+_vocab_size|vocab_size_\w+": VOCAB,
    r"pad_token_id": 0,
    r"bos_token_id|decoder_start_token_id": 1,
    r"eos_token_id": 2,
    r"(\w+_)?num_(\w+_)?(key_value|kv)_heads|num_global_key_value_heads|multi_query_group_num": 2,
    r"(\w+_)?num_(\w+_)?heads|n_heads?|(\w+_)?attention_heads|(\w+_)?nhead|num_heads": 4,
    r"head_dim|d_kv|v_head_dim|qk_\w*head_dim|(\w+_)?head_dim|attention_head_size": 16,
    r"\w+_lora_rank": 32,
    r"hidden_size|d_model|n_embd|embed_dim|(\w+_)?hidden_dim|(\w+_)?hidden_size|dim|embedding_size|out_hidden_size"
    r"|word_embed_proj_dim|projection_dim|\w+_embed_dim|n_state|hidden_channels|width|output_dim": 64,
    r"(\w+_)?intermediate_size|(\w+_)?ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|(\w+_)?feedforward_dim"
    r"|intermediate_dim|feed_forward_proj_dim": 96,
    r"num_hidden_layers|n_layers?|(num_)?(\w+_)?layers|depth|num_blocks": 2,
    r"num_\w*experts_per_tok(en)?|moe_k|top_k|moe_top_?k": 2,
    r"(\w+_)?num_(local_|routed_)?experts|n_routed_experts": 4,
    r"n_group|topk_group|n_shared_experts": 1,
    r"first_k_dense_replace": 1,
    r"max_position_embeddings|n_positions|max_\w*positions|context_length|num_position_embeddings": 128,
    r"image_size": 32,
    r"patch_size": 8,
    r"sliding_window|sliding_window_size|attention_chunk_size|local_attention|window": WIDE,
}
SECTIONS = [2, 3, 3]  # of the rotary frequencies of a head of 16, for time, height and width
WINDOWS = r"sliding_window|sliding_window_size|attention_chunk_size|local_attention"


def tiny_config(config_class: type, window: int = WIDE, **given_values: Any) -> Any:
    """The class's configuration with the fields that TINY knows made small, and those of its parts too."""
    default = config_class()
    values: dict[str, Any] = {}
    for name in inspect.signature(config_class.__init__).parameters:
        given = vars(default).get(name)
        if name == "num_key_value_heads" and hasattr(default, "kv_lora_rank"):
            values[name] = 4  # latent attention has a key for every query head
        elif name in getattr(config_class, "sub_configs", {}):
            if given is not None:
                values[name] = tiny_config(type(given), window)
        elif name == "layer_types" and given:
            values[name] = list(dict.fromkeys(given))
        elif name in ("rope_parameters", "rope_scaling") and isinstance(given, dict):
            values[name] = _tiny_rope(given)
            if name == "rope_parameters" and "rope_type" in given:
                values[name].setdefault(
                    "mrope_section", SECTIONS
                )  # models that read it have a default for larger heads
        elif isinstance(given, float) and "drop" in name:
            values[name] = 0.0
        elif (value := _tiny_value(name, given, window)) is not None:
            values[name] = value
    if "layer_types" in values:
        depth = "num_hidden_layers" if "num_hidden_layers" in values else "n_layer"
        values["layer_types"] *= 2 if len(values["layer_types"]) == 1 else 1
        values[depth] = len(values["layer_types"])
    config = config_class(**values | given_values)
    config._experts_implementation = "eager"  # the only one that computes in fp64
    return config


def _tiny_value(name: str, given: Any, window: int) -> Any:
    """What TINY says for the field, where it holds a size, or sizes, or nothing and a model derives it from others."""
    value = window if re.fullmatch(WINDOWS, name) else next((v for p, v in TINY.items() if re.fullmatch(p, name)), None)
    if value is None or isinstance(given, bool):
        return None
    if given is None:
        return value if re.fullmatch(WINDOWS + "|head_dim|num_key_value_heads|vocab_size", name) else None
    if isinstance(given, (list, tuple)) and name in ("image_size", "patch_size"):
        return type(given)([value] * len(given))
    return value if isinstance(given, int) else None


def _tiny_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary frequencies for heads of 16."""
    return {
        k: _tiny_rope(v) if isinstance(v, dict) else SECTIONS if k == "mrope_section" and v else copy.deepcopy(v)
        for k, v in parameters.items()
    }


def lively(model: nn.Module) -> nn.Module:
    """Every weight matters to the output: unit gain everywhere, nothing at its initial zero or one."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            noise = noise / math.sqrt(max(1, weight[0].numel()))
        elif "norm" in name and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise = 0.2 * noise
        weight.data = noise.to(weight.dtype)
    return model.eval()


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the forward cannot do without, and the text or picture that is its main input."""
    g = torch.Generator().manual_seed(1)
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    audio = getattr(config, "audio_config", None) or config
    size, mels = getattr(vision, "image_size", 32), getattr(audio, "num_mel_bins", 80)
    side = (size, size) if isinstance(size, int) else tuple(size)
    ids = torch.randint(3, VOCAB, (2, TEXT), generator=g)
    width = getattr(config.get_text_config(), "hidden_size", 64)
    known = {
        "input_ids": ids,
        "decoder_input_ids": ids[:, : TEXT - 3],
        "pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), *side, generator=g),
        "input_features": torch.randn(2, mels, 2 * getattr(audio, "max_source_positions", 64), generator=g),
        "input_values": torch.randn(2, 2000, generator=g),
        "inputs_embeds": torch.randn(2, TEXT, width, generator=g),
        "hidden_states": torch.randn(2, TEXT, width, generator=g),
        "encoder_hidden_states": torch.randn(2, TEXT + 2, width, generator=g),
        "attention_mask": torch.ones(2, TEXT, dtype=torch.long),
    }
    parameters = inspect.signature(model.forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if "grid_thw" in required:
        channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
        numbers = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        patches = torch.randn(16, numbers, generator=g)
        known |= {"hidden_states": patches, "pixel_values": patches, "grid_thw": torch.tensor([[1, 4, 4]])}
    crossed = getattr(config, "add_cross_attention", False) or "Decoder" in type(model).__name__
    if crossed and "encoder_hidden_states" in parameters:
        required.add("encoder_hidden_states")
    main = model.main_input_name if model.main_input_name in parameters else next(iter(parameters))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        required.add("decoder_input_ids")
    if missing := (required | {main}) - known.keys():
        raise NotImplementedError(f"inputs unknown here: {sorted(missing)}")
    return {name: known[name] for name in (required | {main}) & parameters.keys()}
