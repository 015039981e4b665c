"""A recipe: everything that decides one stage of training, as plain data."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from training.errors import InputError

Optimizer = Literal["adamw", "deepspeed_cpu_adam"]
Dtype = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "constant"]
PARTS = {"vision": "vision_model.", "adapter": "mlp1.", "language": "language_model."}  # by prefix of parameter names


def _option(default: Any, group: str, text: str) -> Any:
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class Recipe:
    """One stage. A run is one or several, each starting from the weights of the one before."""

    name: str = _option("train", "run", "name of the stage, in metrics and messages")
    seed: int = _option(0, "run", "of weights and data order")
    steps: int = _option(1000, "run", "optimizer steps")
    epochs: float = _option(0.0, "run", "passes over the data, in place of --steps; 0: as many steps as said")
    until_loss: float = _option(0.0, "run", "end the stage where the mean loss of 20 steps is below this")
    save_every: int = _option(500, "run", "steps between checkpoints")
    keep: int = _option(2, "run", "checkpoints kept; older ones are removed")
    log_every: int = _option(10, "run", "steps between lines where the output is no terminal")
    max_bad: float = _option(0.01, "run", "largest share of records that may be unusable before training stops")
    max_not_finite: int = _option(5, "run", "steps in a row without a finite loss and gradient before training stops")

    data: str = _option("easy_vqa", "data", "'easy_vqa', a .jsonl file, a folder of them or of shards, or a mixture")
    test: str = _option(
        "", "data", "data held out, tested at the end: share of answers that are right letter for letter"
    )
    stream_length: int = _option(320, "data", "tokens in a packed stream")
    streams: int = _option(16, "data", "streams in a step, over all processes: the logical streams that data is cut in")
    micro_batches: int = _option(1, "data", "micro-batches a step (gradient accumulation); each on all processes")
    candidates: int = _option(64, "data", "samples that wait to be packed, in each stream")
    picture_balance: bool = _option(False, "data", "the same number of picture tokens in every micro-batch")
    workers: int = _option(0, "data", "processes that read and decode ahead, for each training process")
    max_tiles: int = _option(0, "data", "most tiles of a picture; 0: as the model's image processor has it")
    blank_pictures: bool = _option(False, "data", "train without looking: every picture is blank")

    model: str = _option("demo", "model", "a size from random weights, or a folder: a run, an export, a released model")
    vision: str = _option("", "model", "in place of --model: folder of a SAIL-ViT or AIMv2 encoder")
    language: str = _option("", "model", "in place of --model: folder of a Qwen3 or Qwen3-MoE model")
    train: str = _option("vision,adapter,language", "model", "parts that are trained; all others are frozen")
    lora_rank: int = _option(0, "model", "train low-rank adapters of this rank in the parts trained; 0: the weights")
    lora_alpha: float = _option(16.0, "model", "scale of the low-rank adapters: alpha / rank")
    gradient_checkpointing: bool = _option(False, "model", "recompute activations in backward: less memory, more time")

    lr: float = _option(1e-3, "optimizer", "peak learning rate")
    warmup: int = _option(50, "optimizer", "steps of linear warm-up")
    schedule: Schedule = _option("cosine", "optimizer", "learning rate after the warm-up")
    lr_floor: float = _option(0.02, "optimizer", "where the cosine ends, as a share of the peak")
    vision_lr: float = _option(1.0, "optimizer", "rate of the vision encoder, as a share of all others'")
    adalrs: bool = _option(False, "optimizer", "search the peak learning rate while training (AdaLRS)")
    adalrs_window: int = _option(50, "optimizer", "steps over which AdaLRS measures how fast the loss falls")
    weight_decay: float = _option(0.01, "optimizer", "AdamW weight decay")
    beta2: float = _option(0.98, "optimizer", "AdamW beta 2 (beta 1 is 0.9)")
    clip: float = _option(1.0, "optimizer", "largest gradient norm")
    balance: float = _option(0.01, "optimizer", "coefficient of the load-balancing loss")

    dtype: Dtype = _option("float32", "engine", "type of weights and activations; the optimizer keeps float32")
    optimizer: Optimizer = _option("adamw", "engine", "'adamw' is torch's; DeepSpeed's is compiled on first use")
    zero_stage: int = _option(2, "engine", "DeepSpeed ZeRO stage: 0 to 3")
    offload: bool = _option(True, "engine", "keep optimizer state and update in CPU memory (ZeRO 2 and 3)")

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            self._check_type(name, kind)
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise InputError(f"Recipe: {name}: got {getattr(self, name)}, want more than 0")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise InputError(f"Recipe: {name}: got {getattr(self, name)}, want 0 or more")
        if self.zero_stage not in range(4):
            raise InputError(f"Recipe: zero_stage: got {self.zero_stage}, want 0, 1, 2 or 3")
        if self.zero_stage == 0 and self.dtype != "float32":
            raise InputError("Recipe: zero_stage: got 0 with bfloat16, want 1 to 3, which keep float32 master weights")
        if self.optimizer == "deepspeed_cpu_adam" and not (self.offload and self.zero_stage >= 2):
            raise InputError("Recipe: optimizer: got 'deepspeed_cpu_adam', want it with offload and zero_stage 2 or 3")
        if self.streams % self.micro_batches:
            raise InputError(
                f"Recipe: streams: got {self.streams}, want a multiple of micro_batches, {self.micro_batches}"
            )
        if not self.parts or any(part not in PARTS for part in self.parts):
            raise InputError(f"Recipe: train: got {self.train!r}, want one or several of {','.join(PARTS)}")
        if self.adalrs and self.adalrs_window < 3:
            raise InputError(f"Recipe: adalrs_window: got {self.adalrs_window}, want at least 3")
        if self.lora_rank and self.zero_stage == 3:
            raise InputError(
                "Recipe: lora_rank: got it with zero_stage 3, want 0 to 2: factors are folded into whole weights"
            )
        if bool(self.vision) != bool(self.language):
            raise InputError("Recipe: vision, language: got one of them, want both: the parts of one model")

    def _check_type(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        if choices := get_args(kind):
            if value not in choices:
                raise InputError(f"Recipe: {name}: got {value!r}, want one of {', '.join(map(repr, choices))}")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(self, name, float(value))
        elif type(value) is not kind:
            raise InputError(f"Recipe: {name}: got {value!r}, want {_NOUNS[kind]}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are trained, of `PARTS`."""
        return tuple(part.strip() for part in self.train.split(",") if part.strip())

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a checkpoint."""
        return asdict(self)


_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_POSITIVE = (
    *("steps", "stream_length", "streams", "micro_batches", "candidates", "lr", "clip", "lora_alpha"),
    *("save_every", "keep", "log_every", "max_not_finite", "vision_lr"),
)
_NOT_NEGATIVE = (
    *("warmup", "weight_decay", "balance", "seed", "workers", "max_tiles", "max_bad", "lr_floor"),
    *("lora_rank", "epochs", "until_loss"),
)
# what a resumed run may change: nothing that alters the steps still to come; data may have moved, and is compared
FREE_ON_RESUME = ("save_every", "keep", "log_every", "workers", "max_bad", "max_not_finite", "data", "test")


def read_recipe(values: dict[str, Any], owner: str) -> Recipe:
    """A recipe of these fields; InputError for one that there is not, naming `owner`."""
    known = {entry.name for entry in fields(Recipe)}
    if unknown := values.keys() - known:
        raise InputError(f"{owner}: got {', '.join(sorted(unknown))}, want options of a recipe: {', '.join(known)}")
    return Recipe(**values)


def resumed(saved: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    """The recipe of a checkpoint with `changes`; InputError for a change that would bend the loss curve."""
    recipe = read_recipe(saved, "--resume: the checkpoint's recipe")
    for name, value in changes.items():
        if name not in FREE_ON_RESUME and value != getattr(recipe, name):
            raise InputError(
                f"--resume: {name}: the checkpoint was trained with {getattr(recipe, name)!r}, got {value!r}; "
                f"a resumed run may change only {', '.join(FREE_ON_RESUME)}"
            )
    return replace(recipe, **changes)
