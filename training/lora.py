"""LoRA: W + (alpha / rank) B A beside frozen weights, by PEFT, stacked experts included.

Source: LoRA (arXiv 2106.09685). Experts are one parameter for each projection, [E, out, in], which PEFT adapts by its
`target_parameters`: the factors are folded into the weights of a forward, and their gradients come from dW.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from training.errors import InputError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VISION = ("qkv", "proj", "fc1", "fc2", "fc3")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class LoraOptions:
    """Which weights get factors of what rank; dropout is on the input of linear layers. Raises InputError."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    attention: bool = True
    mlp: bool = True
    experts: bool = True
    vision: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise InputError(
                f"LoRA: got rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}; "
                "want rank >= 1, alpha > 0, 0 <= dropout < 1"
            )
        if not (self.attention or self.mlp or self.experts or self.vision):
            raise InputError("LoRA: got no part to adapt, want attention, mlp, experts or vision")


def wrap(model: nn.Module, options: LoraOptions) -> nn.Module:
    """A PEFT model around `model`, whose own weights it freezes in place; trainable are the factors alone.

    Fresh factors change nothing (B = 0). A part that the model lacks is left out: `mlp` in a model of experts alone.
    Raises InputError where PEFT is missing, nothing fits, or dropout is asked of experts: it has no meaning for
    factors that are folded into the weights.
    """
    peft = _peft()
    modules, parameters = targets(model, options)
    if not modules and not parameters:
        raise InputError("LoRA: the model has none of the parts asked for")
    if parameters and options.dropout:
        raise InputError(f"LoRA: got dropout={options.dropout} with experts, which PEFT cannot drop out; want 0")
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=modules,
        target_parameters=parameters,
    )
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def targets(model: nn.Module, options: LoraOptions) -> tuple[list[str], list[str]]:
    """Full names of the linear layers, and of the stacked experts' parameters, that `options` ask for."""
    text = (ATTENTION if options.attention else ()) + (MLP if options.mlp else ())
    vision = VISION if options.vision else ()
    modules = []
    for name, module in model.named_modules():
        wanted = text if name.startswith("language_model.") else vision if name.startswith("vision_model.") else ()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in wanted:
            modules.append(name)
    experts = [name for name, _ in model.named_parameters() if options.experts and name.endswith(EXPERTS)]
    return modules, experts


def merged(wrapped: nn.Module) -> nn.Module:
    """The model itself with W + (alpha / rank) B A as its weights; `wrapped` is used up. Raises InputError for NaN."""
    try:
        model: nn.Module = wrapped.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        raise InputError(f"LoRA: {error}") from error
    return model


def save_adapter(wrapped: Any, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json: the factors apart from the model, with what is trained whole.

    That, the projector of a recipe, goes along as PEFT's `modules_to_save`, so that the base model and the adapter
    together are the model trained.
    """
    wrapped.save_pretrained(folder)
    whole = {name: p for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in name}
    if not whole:
        return
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {name: p.detach().contiguous() for name, p in whole.items()}
    save_file(load_file(weights) | tensors, weights, metadata={"format": "pt"})
    modules = {name.removeprefix("base_model.model.").split(".")[0] for name in whole}
    described = json.loads(config.read_text()) | {"modules_to_save": sorted(modules)}
    config.write_text(json.dumps(described, indent=2, sort_keys=True))


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """`model` with the factors that `save_adapter` wrote. Raises InputError where they are not there."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"LoRA: {folder}: no adapter_model.safetensors in it")
    loaded: nn.Module = _peft().PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    return loaded


def trainable_share(model: nn.Module) -> float:
    """Trainable parameters / all parameters."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained / sum(parameter.numel() for parameter in model.parameters())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("LoRA needs the package peft: pip install 'sail-ops[train]'") from error
    return peft
