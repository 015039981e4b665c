"""Recipes: everything that decides a training run, as plain data."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from training.errors import InputError

Optimizer = Literal["adamw", "deepspeed_cpu_adam"]
Dtype = Literal["float32", "bfloat16"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """One training run. The defaults train a small SAIL-VL2-MoE on easy-vqa in a few minutes on two CPU cores."""

    data: str = _option("easy_vqa", "'easy_vqa', or a .jsonl file of {picture, questions} records")
    model: str = _option("demo", "model size, a name of training.assemble.MODELS")
    steps: int = _option(2400, "optimizer steps")
    stream_length: int = _option(320, "tokens in a packed stream")
    streams: int = _option(4, "streams a micro-batch, on each process")
    micro_batches: int = _option(1, "micro-batches a step (gradient accumulation)")
    lr: float = _option(1e-3, "peak learning rate")
    warmup: int = _option(50, "steps of linear warm-up")
    weight_decay: float = _option(0.01, "AdamW weight decay")
    beta2: float = _option(0.98, "AdamW beta 2 (beta 1 is 0.9)")
    clip: float = _option(1.0, "largest gradient norm")
    balance: float = _option(0.01, "coefficient of the load-balancing loss")
    dtype: Dtype = _option("float32", "type of weights and activations; the optimizer keeps float32")
    optimizer: Optimizer = _option("adamw", "'adamw' is torch's; 'deepspeed_cpu_adam' is compiled on first use")
    zero_stage: int = _option(2, "DeepSpeed ZeRO stage: 0 or 2")
    offload: bool = _option(True, "keep optimizer state and update in CPU memory (ZeRO 2)")
    seed: int = _option(0, "of weights and data order")
    blank_pictures: bool = _option(False, "train without looking: every picture is blank")
    save_every: int = _option(500, "steps between checkpoints")
    log_every: int = _option(10, "steps between lines where the output is no terminal")

    def __post_init__(self) -> None:
        positive = ("steps", "stream_length", "streams", "micro_batches", "lr", "clip", "save_every", "log_every")
        for name in positive:
            if getattr(self, name) <= 0:
                raise InputError(f"Recipe: {name}: got {getattr(self, name)}, want more than 0")
        for name in ("warmup", "weight_decay", "balance", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"Recipe: {name}: got {getattr(self, name)}, want 0 or more")
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("optimizer", self.optimizer, ("adamw", "deepspeed_cpu_adam"))
        _one_of("zero_stage", self.zero_stage, (0, 2))
        if self.data != "easy_vqa" and not Path(self.data).is_file():
            raise InputError(f"Recipe: data: got {self.data!r}, want 'easy_vqa' or a file that exists")

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a checkpoint."""
        return asdict(self)


# what a resumed run may change: nothing that alters the steps still to come
FREE_ON_RESUME = ("save_every", "log_every")


def resumed(saved: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    """The recipe of a checkpoint with `changes`; InputError for a change that would bend the loss curve."""
    if unknown := saved.keys() - {entry.name for entry in fields(Recipe)}:
        raise InputError(f"--resume: the checkpoint's recipe has unknown fields: {', '.join(sorted(unknown))}")
    recipe = Recipe(**saved)
    for name, value in changes.items():
        if name not in FREE_ON_RESUME and value != getattr(recipe, name):
            raise InputError(
                f"--resume: {name}: the checkpoint was trained with {getattr(recipe, name)!r}, got {value!r}; "
                f"a resumed run may change only {', '.join(FREE_ON_RESUME)}"
            )
    return replace(recipe, **changes)


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise InputError(f"Recipe: {name}: got {value!r}, want one of {', '.join(map(repr, choices))}")
