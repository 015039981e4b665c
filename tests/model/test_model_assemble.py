"""A model from the folders of its parts: what comes from where, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import IMAGE, TILE, lively_model, one_thread, pixels, prompt, tiny_config
from tokenizers import AddedToken
from torch import nn
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2TextConfig,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from sail_model import SailVL2ForConditionalGeneration, SailVL2Processor, assemble, train_tokenizer
from sail_model.tokenizer import ADDED_TOKENS, with_added_tokens

VISION = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=TILE, patch_size=14
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer(["what shape is in the image?"], 291)


def lively(model: nn.Module) -> Any:
    """Norms that are not one, and attention that is not uniform."""
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.fixture
def aimv2(tmp_path: Path) -> Path:
    lively(Aimv2VisionModel(Aimv2VisionConfig(**VISION))).save_pretrained(tmp_path / "aimv2")
    return tmp_path / "aimv2"


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def qwen3(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Qwen2Tokenizer) -> Path:
    config = tiny_config(request.param, tie_word_embeddings=not request.param).text_config
    model = (Qwen3MoeForCausalLM if request.param else Qwen3ForCausalLM)(config)
    lively(model).save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_parts_compute_what_they_did(aimv2: Path, qwen3: Path, tmp_path: Path) -> None:
    model, processor = assemble(aimv2, qwen3)
    encoder = Aimv2VisionModel.from_pretrained(aimv2)
    torch.testing.assert_close(model.vision_model(pixels(2)), encoder(pixels(2)).last_hidden_state)
    language = Qwen3MoeForCausalLM if model.config.text_config.model_type == "qwen3_moe" else Qwen3ForCausalLM
    ids = prompt(0, 9, 1)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, language.from_pretrained(qwen3)(input_ids=ids).logits)
    assert not any(weight.is_meta or not weight.requires_grad for weight in model.parameters())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        model.config.tie_word_embeddings
    )
    # the adapter is as fresh as in a model that was not assembled, and the two work together
    assert 0.01 < model.mlp1[1].weight.std() < 0.03 and not model.mlp1[1].bias.any()
    inputs = processor(images=[torch.zeros(TILE, TILE, 3, dtype=torch.uint8).numpy()], text="<image>what?")
    want = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    again = SailVL2ForConditionalGeneration.from_pretrained(tmp_path / "whole")
    inputs = SailVL2Processor.from_pretrained(tmp_path / "whole")(
        images=[torch.zeros(TILE, TILE, 3, dtype=torch.uint8).numpy()], text="<image>what?"
    )
    assert torch.equal(again.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False), want)


@pytest.mark.parametrize("qwen3", [False], indirect=True, ids=["dense"])
@pytest.mark.parametrize("kind", ["sail_vl2", "sailvl", "aimv2 with a text tower", "apple"])
def test_encoders_of_other_folders(kind: str, qwen3: Path, tmp_path: Path) -> None:
    """A tiny SAIL-VL2's encoder, in each form that it may lie in."""
    folder, ours = tmp_path / "vision", lively_model(tiny_config(True))
    want = ours.vision_model(pixels(2))
    if kind == "aimv2 with a text tower":
        text = Aimv2TextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        both = lively(Aimv2Model(Aimv2Config(text_config=text, vision_config=Aimv2VisionConfig(**VISION))))
        both.save_pretrained(folder, max_shard_size="50KB")
        assert (folder / "model.safetensors.index.json").is_file()
        want = both.vision_model(pixels(2)).last_hidden_state
    else:
        ours.save_pretrained(folder)
    if kind == "apple":
        state = {name.removeprefix("vision_model."): value for name, value in ours.state_dict().items()}
        save_file({name: state[name] for name in ours.vision_model.state_dict()}, folder / "model.safetensors")
        fields = VISION | dict(model_type="aimv2", architectures=["AIMv2Model"], use_bias=False, torch_dtype="float32")
        (folder / "config.json").write_text(json.dumps(fields))
    elif kind == "sailvl":
        config = json.loads((folder / "config.json").read_text())
        released = dict(model_type="sailvl", llm_config=config["text_config"], force_image_size=TILE)
        kept = ("vision_config", "downsample_ratio", "ps_version", "select_layer")
        (folder / "config.json").write_text(json.dumps(released | {name: config[name] for name in kept}))
    model, _ = assemble(folder, qwen3)
    torch.testing.assert_close(model.vision_model(pixels(2)), want)


@pytest.mark.parametrize("qwen3", [True], indirect=True, ids=["moe"])
def test_a_tokenizer_without_the_added_tokens(aimv2: Path, qwen3: Path, tokenizer: Qwen2Tokenizer) -> None:
    """It gets them, and the embeddings grow as transformers grows them: around the mean of the old rows."""
    plain = train_tokenizer(["what shape is in the image?" * 3], 300)
    kept = plain.get_vocab().items()
    vocab = {token: id for token, id in kept if token not in ADDED_TOKENS}
    bare = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, eos_token=None, pad_token=None)
    bare.add_tokens([AddedToken(f"<{i}>") for i in range(299 - len(bare))])
    bare.save_pretrained(qwen3)
    torch.manual_seed(0)
    model, processor = assemble(aimv2, qwen3)
    lacking = len(processor.tokenizer) - len(bare)
    assert lacking >= 9 and model.config.text_config.vocab_size == 299 + lacking
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") > IMAGE
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    grown = Qwen3MoeForCausalLM.from_pretrained(qwen3)
    torch.manual_seed(0)
    grown.resize_token_embeddings(299 + lacking)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, part)().weight, getattr(grown, part)().weight)
    for token, name in (("<|im_end|>", "eos_token_id"), ("<|endoftext|>", "pad_token_id")):
        wanted = processor.tokenizer.convert_tokens_to_ids(token)
        assert getattr(model.config.text_config, name) == getattr(model.generation_config, name) == wanted


def test_added_tokens_are_not_added_twice(tokenizer: Qwen2Tokenizer) -> None:
    before = dict(tokenizer.get_vocab())
    assert with_added_tokens(tokenizer).get_vocab() == before


@pytest.mark.parametrize("qwen3", [True], indirect=True, ids=["moe"])
def test_a_dtype_for_all_parts(aimv2: Path, qwen3: Path) -> None:
    model, _ = assemble(aimv2, qwen3, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


@pytest.mark.parametrize("qwen3", [False], indirect=True, ids=["dense"])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("no folder", FileNotFoundError, "nowhere has no config.json"),
        ("swapped", ValueError, r"qwen3 holds a 'qwen3', wanted a SAIL-VL2"),
        ("no language", ValueError, r"holds a 'aimv2_vision_model', wanted one of qwen3, qwen3_moe"),
        ("bias", ValueError, "mlp_bias=True is not SAIL-ViT's, only False"),
        ("no safetensors", FileNotFoundError, r"aimv2 has neither model.safetensors nor model.safetensors.index.json"),
        ("no language safetensors", FileNotFoundError, r"qwen3 has neither model.safetensors"),
        ("no tokenizer", FileNotFoundError, "qwen3 has neither tokenizer.json nor vocab.json"),
        ("a weight is missing", ValueError, r"1 weights do not fit .*post_trunk_norm.weight \(got None"),
        ("a weight of another size", ValueError, r"do not fit .*fc1.weight \(got .*80, 48.*, wanted .*96, 48"),
        ("language of another depth", ValueError, r"qwen3 does not fit its config.json: .*layers.3"),
    ],
)
def test_what_is_refused(fault: str, error: type, message: str, aimv2: Path, qwen3: Path, tmp_path: Path) -> None:
    vision, language = aimv2, qwen3
    weights = aimv2 / "model.safetensors"
    if fault == "no folder":
        vision = tmp_path / "nowhere"
    elif fault == "swapped":
        vision, language = qwen3, aimv2
    elif fault == "no language":
        language = aimv2
    elif fault == "bias":
        change_config(aimv2, mlp_bias=True)
    elif fault == "no safetensors":
        weights.rename(aimv2 / "pytorch_model.bin")
    elif fault == "no language safetensors":
        (qwen3 / "model.safetensors").rename(qwen3 / "pytorch_model.bin")
    elif fault == "no tokenizer":
        (qwen3 / "tokenizer.json").unlink()
    elif fault == "a weight is missing":
        state = load_file(weights)
        del state["rms_norm.weight"]
        save_file(state, weights)
    elif fault == "a weight of another size":
        change_config(aimv2, intermediate_size=96)
    else:
        change_config(qwen3, num_hidden_layers=4, layer_types=None)
    with pytest.raises(error, match=message):
        assemble(vision, language)
