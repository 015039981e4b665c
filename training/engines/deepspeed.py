"""DeepSpeed: ZeRO with the optimizer in CPU memory, behind the few calls that the trainer makes."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from training.device import start_processes
from training.errors import InputError
from training.recipes import Recipe

TAG = "engine"


class DeepSpeedEngine:
    """`model` under ZeRO stage 0 or 2; gradients are the mean over ranks and micro-batches of each loss given.

    Experts must be stacked parameters that always get dense gradients: under ZeRO-2, a parameter that one rank
    skips gets a silently wrong gradient.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        start_processes()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        import deepspeed.ops

        # an inference all-reduce that DeepSpeed compiles (35 s) whenever it starts on a CPU; training never calls it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model, recipe.weight_decay), config=deepspeed_config(recipe)
        )

    def forward(self, *inputs: Any) -> Any:
        """The model's output, recorded for `backward`."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of loss / micro_batches, added to the step's; updates at the step's last micro-batch."""
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """Count a micro-batch; after the last one of a step, clip and update with learning rate `lr`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def grad_norm(self) -> float:
        """Gradient norm of the last update, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Weights and optimizer state of this rank, under `folder`; called on every rank."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """What `save` wrote, with the same number of ranks. Raises InputError where it is not there."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise InputError(f"--resume: {folder}: no DeepSpeed checkpoint {TAG!r} in it")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe in DeepSpeed's terms."""
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if recipe.zero_stage == 2 and recipe.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    adam = {"lr": recipe.lr, "betas": [0.9, recipe.beta2], "weight_decay": recipe.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": recipe.streams,
        "gradient_accumulation_steps": recipe.micro_batches,
        "gradient_clipping": recipe.clip,
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": recipe.optimizer == "adamw"}},
        "zero_optimization": zero,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
