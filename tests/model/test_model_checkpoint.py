"""SAIL-VL2's configurations, fresh weights, and checkpoints in and out."""

import copy
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import EOS, IMAGE, VOCAB, lively_model, one_thread, pixels, prompt, tiny_config

from sail_model import PRESETS, SailViTConfig, SailVL2Config, SailVL2ForConditionalGeneration, load_released
from sail_model.config import SAIL_VIT_LARGE

Model = SailVL2ForConditionalGeneration


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- configurations -------------------------------------------------------------------------------------------------
VIT_HUGE, MLP1 = 682_031_616, {1024: 7_354_368, 2048: 16_793_600, 4096: 41_963_520}
TEXT = {
    "SAIL-VL2-1B": (596_049_920, 1024),
    "SAIL-VL2-2B": (1_720_574_976, 2048),
    "SAIL-VL2-8B": (8_190_735_360, 4096),
    "SAIL-VL2-30B-A3B": (30_532_122_624, 2048),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_of_the_zoo(name: str) -> None:
    with torch.device("meta"):
        model = Model(SailVL2Config.from_preset(name))
    text, hidden = TEXT[name]
    assert sum(p.numel() for p in model.vision_model.parameters()) == VIT_HUGE
    assert sum(p.numel() for p in model.mlp1.parameters()) == MLP1[hidden]
    assert sum(p.numel() for p in model.language_model.parameters()) == text
    assert model.config.tokens_per_tile == 256
    if name == "SAIL-VL2-2B":  # the released file stores the tied head as well: 490 tensors, 5,461,130,240 bytes
        assert len(model.state_dict()) == 490
        assert 2 * sum(value.numel() for value in model.state_dict().values()) == 5_461_130_240
    if name == "SAIL-VL2-30B-A3B":
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        assert text - experts * (128 - 8) // 128 == 3_353_032_704


def test_parameter_count_of_the_large_encoder() -> None:
    with torch.device("meta"):
        model = Model(SailVL2Config(vision_config=SAIL_VIT_LARGE, text_config=tiny_config(False).text_config))
    assert sum(p.numel() for p in model.vision_model.parameters()) == 309_984_256


def test_released_key_names() -> None:
    """The names of the released 2B file, layers counted out."""
    wanted = {"mlp1.0", "mlp1.1", "mlp1.3"}
    wanted = {f"{name}.{kind}" for name in wanted for kind in ("weight", "bias")}
    wanted |= {f"vision_model.preprocessor.patchifier.{n}" for n in ("proj.weight", "proj.bias", "norm.weight")}
    wanted |= {"vision_model.preprocessor.pos_embed", "vision_model.trunk.post_trunk_norm.weight"}
    for block in range(2):
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.fc3", "norm_1", "norm_2"):
            wanted.add(f"vision_model.trunk.blocks.{block}.{name}.weight")
    wanted |= {f"language_model.{n}.weight" for n in ("model.embed_tokens", "model.norm", "lm_head")}
    for layer in range(3):
        for name in (
            *(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
        ):
            wanted.add(f"language_model.model.layers.{layer}.{name}.weight")
    assert Model(tiny_config(False)).state_dict().keys() == wanted


@pytest.mark.parametrize(
    "change",
    [
        dict(ps_version="v1"),
        dict(select_layer=-4),
        dict(downsample_ratio=0.3),
        dict(text_config=dict(model_type="llama")),
        dict(text_config=dict(model_type="qwen3", hidden_act="gelu")),
        dict(text_config=dict(model_type="qwen3", use_sliding_window=True, sliding_window=4)),
        dict(
            text_config=dict(model_type="qwen3", rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))
        ),
        dict(vision_config=dict(qkv_bias=True)),
        dict(vision_config=dict(image_size=450)),
        dict(vision_config=dict(num_attention_heads=7)),
    ],
    ids=str,
)
def test_settings_that_are_not_implemented_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"SailVL2Config|SailViTConfig"):
        SailVL2Config(**change)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"no preset 'SAIL-VL3'.*SAIL-VL2-2B"):
        SailVL2Config.from_preset("SAIL-VL3")


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_fresh_weights_are_fit_for_training(moe: bool) -> None:
    torch.manual_seed(0)
    model = Model(tiny_config(moe))
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        constant = name.endswith("bias") or "norm" in name or name == "mlp1.0.weight"
        assert (weight.std() == 0) == constant, name
    ids = prompt(1, 60, 1)[None]
    loss = model(input_ids=ids, pixel_values=pixels(1), labels=ids).loss
    assert abs(loss - torch.tensor(float(VOCAB)).log()) < 0.1, "a fresh model should guess uniformly"
    o_proj, q_proj = (
        model.language_model.model.layers[0].self_attn.get_submodule(n).weight for n in ("o_proj", "q_proj")
    )
    assert 0.8 < q_proj.std() / o_proj.std() / 6**0.5 < 1.2, "3 layers write twice each to the residual stream"


# ---- checkpoints ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_checkpoint_round_trip_is_exact(moe: bool, tied: bool, tmp_path: Path) -> None:
    model = lively_model(tiny_config(moe, tie_word_embeddings=tied)).bfloat16()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("language_model.lm_head.weight" in stored) != tied
    assert any(".experts.7.up_proj.weight" in key for key in stored) == moe
    again = Model.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "again")
    config, config_again = ((tmp_path / each / "config.json").read_text() for each in (".", "again"))
    without_dtype = re.compile(r' *"dtype": .*\n')  # loading adds it to the parts
    assert without_dtype.sub("", config_again) == without_dtype.sub("", config)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    head, embeddings = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) == tied


def test_copies_are_the_model_and_not_tied_to_it() -> None:
    model = lively_model(tiny_config(True, tie_word_embeddings=True))
    inputs = dict(input_ids=prompt(2, 9, 1)[None], pixel_values=pixels(2))
    wanted = model(**inputs).logits
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    model.language_model.model.embed_tokens.weight.data.zero_()
    for each in copies:
        assert torch.equal(each(**inputs).logits, wanted)
        assert each.language_model.lm_head.weight is each.language_model.model.embed_tokens.weight
        assert each.generation_config.suppress_tokens == [IMAGE]


def released_folder(folder: Path, model: Model, **overrides: Any) -> Path:
    """What SAIL-VL2-2B looks like on disk: its own config.json, a tied lm_head stored all the same."""
    config = model.config
    text = config.text_config.to_dict()
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    released = dict(
        model_type="sailvl",
        architectures=["SAILVLModel"],
        llm_config=text,
        vision_config=config.vision_config.to_dict(),
        force_image_size=config.vision_config.image_size,
        downsample_ratio=0.5,
        ps_version="v2",
        select_layer=-1,
        torch_dtype="bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(released | overrides))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("stored_head", [True, False])
def test_released_folder(stored_head: bool, tmp_path: Path) -> None:
    model = lively_model(tiny_config(False, tie_word_embeddings=True)).bfloat16()
    released_folder(tmp_path, model)
    if not stored_head:
        state = load_file(tmp_path / "model.safetensors")
        del state["language_model.lm_head.weight"]
        save_file(state, tmp_path / "model.safetensors")
    loaded = load_released(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    loaded.config.image_token_id = IMAGE  # the released id is beyond this small vocabulary
    ids = prompt(1, 6, 1)[None]
    got, want = (m(input_ids=ids, pixel_values=pixels(1)).logits for m in (loaded, model))
    assert torch.equal(got, want)


def test_released_head_that_is_not_the_embeddings_is_kept(tmp_path: Path) -> None:
    model = lively_model(tiny_config(False, tie_word_embeddings=True))
    released_folder(tmp_path, model)
    state = load_file(tmp_path / "model.safetensors")
    state["language_model.lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_released(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, state["language_model.lm_head.weight"])
    assert torch.equal(loaded.get_input_embeddings().weight, state["language_model.model.embed_tokens.weight"])


def test_released_folder_that_does_not_fit(tmp_path: Path) -> None:
    model = lively_model(tiny_config(False))
    released_folder(tmp_path, model)
    state = load_file(tmp_path / "model.safetensors")
    state["mlp1.9.weight"] = state.pop("mlp1.3.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp1\.3\.weight.*mlp1\.9\.weight"):
        load_released(tmp_path)
    released_folder(tmp_path, model, model_type="internvl_chat")
    with pytest.raises(ValueError, match="internvl_chat"):
        load_released(tmp_path)


def test_stacked_experts_load_too(tmp_path: Path) -> None:
    model = lively_model(tiny_config(True))
    model.save_pretrained(tmp_path)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = Model.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_vision_config_defaults_to_the_huge_encoder() -> None:
    config = SailViTConfig()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1536, 4096, 24)
    assert (config.num_attention_heads, config.grid_size, config.rms_norm_eps) == (12, 32, 1e-5)
    assert tiny_config(False).text_config.eos_token_id == EOS
