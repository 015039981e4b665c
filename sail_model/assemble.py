"""A SAIL-VL2 from parts: the encoder of one folder, the language model of another, a fresh adapter between them.

Nothing is downloaded, weights are read from safetensors alone, and no folder's Python code is run.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Aimv2VisionConfig, AutoModelForCausalLM, Qwen2Tokenizer

from .checkpoint import released_config
from .config import SailViTConfig, SailVL2Config
from .model import SailVL2ForConditionalGeneration
from .processor import SailVL2Processor
from .tiling import SailVL2ImageProcessor
from .tokenizer import IMAGE_CONTEXT, with_added_tokens

State = dict[str, Tensor]
LANGUAGE = ("qwen3", "qwen3_moe")
# names of transformers' Aimv2VisionModel -> ours; q, k and v are one weight here
AIMV2_NAMES = (
    (r"^embeddings\.patch_embed\.", "preprocessor.patchifier.proj."),
    (r"^embeddings\.rms_norm\.", "preprocessor.patchifier.norm."),
    (r"^embeddings\.position_embedding\.weight$", "preprocessor.pos_embed"),
    (r"^rms_norm\.", "trunk.post_trunk_norm."),
    (r"^encoder\.layers\.", "trunk.blocks."),
    (r"\.attention\.out_proj\.", ".attn.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.ffn\.gate_proj\.", ".mlp.fc1."),
    (r"\.ffn\.up_proj\.", ".mlp.fc3."),
    (r"\.ffn\.down_proj\.", ".mlp.fc2."),
    (r"\.rms_norm([12])\.", r".norm_\1."),
)


def assemble(
    vision: str | Path,
    language: str | Path,
    *,
    downsample_ratio: float = 0.5,
    max_dynamic_patch: int = 10,
    dtype: torch.dtype | None = None,
) -> tuple[SailVL2ForConditionalGeneration, SailVL2Processor]:
    """The model and the processor of a vision-language model that has yet to be trained.

    vision: a SAIL-VL2 folder (saved here, or as released), whose encoder is taken; or an AIMv2 folder: transformers'
        Aimv2VisionModel or Aimv2Model, or Apple's own layout. The pooling head and the text tower are left behind.
    language: a Qwen3 or Qwen3-MoE folder of transformers with its tokenizer, which gets those of SAIL-VL2's added
        tokens that it lacks. Where the embeddings have too few rows, they grow as transformers grows them: new rows are
        drawn around the mean of the old ones, so that no new token is likelier than the average.
    The adapter is drawn from torch's random numbers, as in a fresh model. The answer's end is `<|im_end|>`.
    dtype: of all weights; by default that of the language folder.
    Raises FileNotFoundError for a folder without config.json or safetensors, ValueError for one of another kind, for
    settings that SAIL-VL2 does not have, and for weights that do not fit their config.json.
    """
    vision, language = Path(vision), Path(language)
    vision_config, encoder = read_encoder(vision)
    if (kind := read_config(language).get("model_type")) not in LANGUAGE:
        raise ValueError(f"assemble: {language} holds a {kind!r}, wanted one of {', '.join(LANGUAGE)}")
    if not any((language / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"assemble: {language} has neither tokenizer.json nor vocab.json; wanted its tokenizer")
    tokenizer = with_added_tokens(Qwen2Tokenizer.from_pretrained(language, local_files_only=True))
    decoder = read_decoder(language, len(tokenizer), dtype)
    decoder.config.eos_token_id, decoder.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = SailVL2Config(
        vision_config=vision_config,
        text_config=decoder.config,
        image_token_id=tokenizer.get_vocab()[IMAGE_CONTEXT],
        downsample_ratio=downsample_ratio,
        dtype=decoder.dtype,
    )
    state = {f"vision_model.{name}": weight.to(decoder.dtype) for name, weight in encoder.items()}
    state |= {f"language_model.{name}": weight for name, weight in decoder.state_dict().items()}
    pictures = SailVL2ImageProcessor(config.vision_config.image_size, max_dynamic_patch)
    return build(config, state), SailVL2Processor(pictures, tokenizer, tokens_per_tile=config.tokens_per_tile)


def build(config: SailVL2Config, state: State) -> SailVL2ForConditionalGeneration:
    """The model that takes these tensors as its weights, without a copy, and a fresh adapter."""
    with torch.device("meta"):
        model = SailVL2ForConditionalGeneration(config)
    model.mlp1.to_empty(device="cpu").to(config.dtype)
    model.mlp1.apply(model._init_weights)
    wanted = {name: weight.shape for name, weight in model.state_dict().items() if not name.startswith("mlp1.")}
    given = {name: weight.shape for name, weight in state.items()}
    if faults := sorted(name for name in wanted | given if wanted.get(name) != given.get(name)):
        listed = ", ".join(f"{name} (got {given.get(name)}, wanted {wanted.get(name)})" for name in faults[:4])
        raise ValueError(f"assemble: {len(faults)} weights do not fit config.json: {listed}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def read_decoder(folder: Path, tokens: int, dtype: torch.dtype | None) -> Any:
    """transformers' model in a folder, with embeddings of at least `tokens` rows."""
    weight_files(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, report = loaded
    faults = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise ValueError(f"assemble: {folder} does not fit its config.json: {faults}")
    if model.config.vocab_size < tokens:
        model.resize_token_embeddings(tokens)
    return model


def read_encoder(folder: Path) -> tuple[SailViTConfig, State]:
    """Configuration and weights of the SAIL-ViT or AIMv2 in a folder, under SailViT's names."""
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in ("sail_vl2", "sailvl"):
        whole = SailVL2Config(**config) if kind == "sail_vl2" else released_config(config)
        return whole.vision_config, read_weights(folder, "vision_model.")
    if kind == "aimv2" and "vision_config" not in config:  # Apple's own layout, which SAIL-ViT has kept
        known = {name: config[name] for name in SailViTConfig.__annotations__ if name in config}
        return SailViTConfig(**known), read_weights(folder, "")
    if kind == "aimv2_vision_model":
        return vit_config(config, folder), from_aimv2(read_weights(folder, ""))
    if kind == "aimv2":
        return vit_config(config["vision_config"], folder), from_aimv2(read_weights(folder, "vision_model."))
    raise ValueError(
        f"assemble: {folder} holds a {kind!r}, wanted a SAIL-VL2 ('sail_vl2' or 'sailvl') or an AIMv2"
        " ('aimv2_vision_model' or 'aimv2')"
    )


def vit_config(fields: dict[str, Any], folder: Path) -> SailViTConfig:
    """For transformers' configuration of an AIMv2 encoder."""
    given = Aimv2VisionConfig(**fields)
    for name, wanted in dict(hidden_act="silu", mlp_bias=False, is_native=False).items():
        if getattr(given, name) != wanted:
            raise ValueError(f"assemble: {folder}: {name}={getattr(given, name)!r} is not SAIL-ViT's, only {wanted!r}")
    shared = set(SailViTConfig.__annotations__) & set(Aimv2VisionConfig.__annotations__)
    return SailViTConfig(**{name: getattr(given, name) for name in shared - {"model_type", "base_config_key"}})


def from_aimv2(state: State) -> State:
    """transformers' names and layouts -> SailViT's; the pooling head is dropped."""
    mapped: State = {}
    for name, weight in state.items():
        for pattern, replacement in AIMV2_NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("head."):
            mapped[name] = weight[None] if name == "preprocessor.pos_embed" else weight
    for name in [name for name in mapped if name.endswith(".attn.q.weight")]:
        parts = [mapped.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        mapped[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return mapped


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    if not (path := folder / "config.json").is_file():
        raise FileNotFoundError(f"assemble: {folder} has no config.json; wanted a model's folder")
    return json.loads(path.read_text(encoding="utf-8"))


def read_weights(folder: Path, prefix: str) -> State:
    """The tensors whose names start with `prefix`, without it."""
    state: State = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = (name for name in file.keys() if name.startswith(prefix))  # noqa: SIM118  (no mapping)
            state |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return state


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: one file, or the shards that its index names."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / shard for shard in sorted(set(weight_map.values()))]
    if not whole.is_file():
        raise FileNotFoundError(f"assemble: {folder} has neither {whole.name} nor {index.name}; wanted safetensors")
    return [whole]
