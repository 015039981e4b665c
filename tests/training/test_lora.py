"""LoRA on every part: right gradients, nothing else trained, merged and apart the same model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import lively_model, one_thread, pixels, prompt, tiny_config
from torch import nn

from training import parallel
from training.checkpoint import NotSaved
from training.errors import InputError
from training.lora import LoraOptions, load_adapter, merged, save_adapter, targets, trainable_share, wrap
from training.run import export_adapter

IDS, PIXELS = prompt(1, 12, 0)[None], pixels(1)
ALL = LoraOptions(rank=2, alpha=6.0, vision=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def adapted(moe: bool = True, options: LoraOptions = ALL) -> Any:
    """A wrapped model whose factors matter, equal each time: B is zero when fresh, A random."""
    wrapped = wrap(lively_model(tiny_config(moe)), options)
    generator = torch.Generator().manual_seed(3)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return wrapped.eval()


def backward(model: nn.Module) -> None:
    model(input_ids=IDS, pixel_values=PIXELS, labels=IDS).loss.backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("moe", [False, True])
def test_fresh_factors_change_nothing_and_only_they_are_trained(moe: bool) -> None:
    model = lively_model(tiny_config(moe))
    before = model(input_ids=IDS, pixel_values=PIXELS).logits
    wrapped = wrap(model, ALL)
    assert torch.equal(wrapped(input_ids=IDS, pixel_values=PIXELS).logits, before)
    backward(wrapped)
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert trained == gradients(wrapped).keys() and all("lora_" in name for name in trained)
    assert 0 < trainable_share(wrapped) < 0.2


def test_targets_are_the_parts_asked_for() -> None:
    model = lively_model(tiny_config(True))
    modules, experts = targets(model, LoraOptions())
    assert len(modules) == 3 * 4 and len(experts) == 3 * 2
    modules, experts = targets(model, LoraOptions(attention=False, experts=False, vision=True))
    assert len(modules) == 2 * 5 and not experts
    assert len(targets(lively_model(tiny_config(False)), LoraOptions())[0]) == 3 * 7


def test_gradients_of_the_factors_are_those_of_the_dense_weights() -> None:
    """dB_e = s dW_e A_e^T and dA_e = s B_e^T dW_e, with dW of a model that has W + s B A as its weights."""
    wrapped = adapted()
    backward(wrapped)
    factors = {name: (weight.detach().clone(), weight.grad) for name, weight in wrapped.named_parameters()}
    layer = "base_model.model.language_model.model.layers.1."
    dense = merged(wrapped).requires_grad_(True)
    backward(dense)
    scale, layer_1 = 6.0 / 2, dense.language_model.model.layers[1]  # type: ignore[union-attr, index]
    places = {
        "self_attn.q_proj.": layer_1.self_attn.q_proj.weight.grad,
        "mlp.experts.base_layer.": layer_1.mlp.experts.gate_up_proj.grad,
        "mlp.experts.": layer_1.mlp.experts.down_proj.grad,
    }
    for place, dw in places.items():
        dw_EOI = dw if dw.dim() == 3 else dw[None]
        (a, da), (b, db) = (factors[f"{layer}{place}lora_{side}.default.weight"] for side in "AB")
        a_ERI, da_ERI = (side.unflatten(0, (len(dw_EOI), -1)) for side in (a, da))
        b_EOR, db_EOR = (side.unflatten(1, (-1, len(dw_EOI))).permute(2, 0, 1) for side in (b, db))
        assert dw_EOI.abs().max() > 1e-3
        torch.testing.assert_close(db_EOR, scale * dw_EOI @ a_ERI.mT)
        torch.testing.assert_close(da_ERI, scale * b_EOR.mT @ dw_EOI)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = adapted(), adapted()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, saving):
        backward(model.train())
    wanted, found = gradients(plain), gradients(saving)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("projector", [False, True])
def test_adapter_apart_and_merged_are_the_same_model(projector: bool, tmp_path: Path) -> None:
    wrapped = adapted()
    if projector:  # trained whole, as a recipe does
        for weight in wrapped.base_model.model.mlp1.parameters():
            weight.requires_grad_().data.mul_(1.5)
    logits = wrapped(input_ids=IDS, pixel_values=PIXELS).logits
    save_adapter(wrapped, tmp_path)
    loaded = load_adapter(lively_model(tiny_config(True)), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS, pixel_values=PIXELS).logits, logits)
    greedy = {"input_ids": IDS, "pixel_values": PIXELS, "max_new_tokens": 3, "do_sample": False}
    words = loaded.generate(**greedy)  # type: ignore[operator]
    model = merged(wrapped)
    assert not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(model(input_ids=IDS, pixel_values=PIXELS).logits, logits)
    assert torch.equal(model.generate(**greedy), words)  # type: ignore[operator]


@pytest.mark.usefixtures("alone")
def test_the_first_rank_alone_writes_the_adapter_and_a_full_disk_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wrapped = tmp_path / "adapter", adapted()
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "is_first", lambda: False)
        export_adapter(wrapped, folder)
    assert not list(tmp_path.iterdir())
    export_adapter(wrapped, folder)
    written = (folder / "adapter_model.safetensors").read_bytes()

    def full(_: Any, writing: Path) -> None:
        (writing / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.run.save_adapter", full)
    with pytest.raises(NotSaved, match="adapter: could not be written: .*No space left"):
        export_adapter(wrapped, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    loaded = load_adapter(lively_model(tiny_config(True)), tmp_path, trainable=True)
    backward(loaded)
    assert gradients(loaded) and trainable_share(loaded) > 0


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(tiny_config(True))
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(InputError, match="want rank >= 1"):
            LoraOptions(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no part"):
        LoraOptions(attention=False, mlp=False, experts=False)
    with pytest.raises(InputError, match="dropout=0.1 with experts"):
        wrap(model, LoraOptions(dropout=0.1))
    with pytest.raises(InputError, match="none of the parts"):
        wrap(model, LoraOptions(attention=False, experts=False))
    with pytest.raises(InputError, match="no adapter_model"):
        load_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="needs the package peft"):
        wrap(model, LoraOptions())
