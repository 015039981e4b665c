"""DeepSpeed: ZeRO 0 to 3, the optimizer in CPU memory where asked, as an `Engine`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import sail_ops
from training import parallel
from training.data.batch import Batch
from training.engines import fragments
from training.engines.engine import StepResult
from training.engines.ordered import InOrder
from training.errors import InputError
from training.recipes import PARTS, Recipe

STATE = "engine.json"


class DeepSpeedEngine:
    """`objective`, whose parameters that require a gradient are trained by the recipe's rates.

    Experts must be stacked parameters that always get dense gradients: under ZeRO, a parameter that one rank skips
    gets a silently wrong gradient.
    """

    def __init__(self, objective: nn.Module, recipe: Recipe) -> None:
        parallel.start_processes()
        import deepspeed
        import deepspeed.ops

        # an inference all-reduce that DeepSpeed compiles (35 s) whenever it starts on a CPU; training never calls it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=parallel.kind().backend, verbose=False)
        self.recipe, self.objective = recipe, objective
        self.data_rank, self.data_world = parallel.rank(), parallel.world()
        self.dtype = getattr(torch, recipe.dtype)
        self.steps, self._norm = 0, 0.0
        groups = parameter_groups(objective, recipe)
        self._engine, *_ = deepspeed.initialize(
            model=objective, model_parameters=groups, config=deepspeed_config(recipe, self.data_world)
        )
        if recipe.zero_stage == 2:
            InOrder(self._engine.optimizer)
        elif recipe.zero_stage == 3:
            # read by the loss, outside of its own module's forward
            head = objective.get_submodule("model.language_model.lm_head")
            deepspeed.zero.register_external_parameter(objective, head.weight)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As `Engine.train_step`."""
        (labels,) = parallel.sum_over_ranks([float(sum(batch.labels for batch in batches))])
        # the engine takes the mean over ranks and micro-batches; this turns it into the mean over all labels
        share = self.data_world * len(batches) / max(1.0, labels)
        loss_sum, counts, balances = 0.0, [], []
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        for number, batch in enumerate(batches, start=1):
            out = self._engine(batch.to(parallel.device(), self.dtype))
            balance_M = sail_ops.load_balancing_loss(
                out.counts_ME, out.prob_sum_ME, batch.tokens, group=parallel.data_group()
            )
            # 0 x loss is NaN where the loss is not finite: then its gradient is too, and no rank makes the step
            self._engine.backward(
                out.loss_sum * (share + 0.0 * out.loss_sum.detach()) + self.recipe.balance * _mean(balance_M)
            )
            if number == len(batches) and not self.recipe.zero_stage:
                self._norm = self._clip()
            self._engine.step()
            loss_sum += float(out.loss_sum.detach())
            counts.append(out.counts_ME.detach().to(parallel.HOST))
            balances.append(balance_M.detach().to(parallel.HOST))
        return self._result(loss_sum, int(labels), torch.stack(counts).sum(0), torch.stack(balances).mean(0))

    def _result(self, loss_sum: float, labels: int, counts_ME: Tensor, balance_M: Tensor) -> StepResult:
        total, *counts = parallel.sum_over_ranks([loss_sum, *counts_ME.double().flatten().tolist()])
        norm = float(self._engine.get_global_grad_norm() if self.recipe.zero_stage else self._norm)
        if getattr(self._engine.optimizer, "overflow", False):
            norm = math.nan  # ZeRO 3 keeps the one of the step before
        finite = math.isfinite(norm)
        self.steps += finite
        summed = torch.tensor(counts, dtype=torch.float64).view(counts_ME.shape)
        return StepResult(total / max(1, labels), labels, balance_M.tolist(), summed, norm, finite)

    def _clip(self) -> float:
        """The gradients' norm. Without ZeRO nothing looks at it: gradients that are not finite go, and AdamW leaves
        weights without one alone; DeepSpeed's own clipping asks for at least one."""
        trained = [parameter for parameter in self.objective.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(cast(Tensor, parameter.grad) for parameter in trained)
        if math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(trained, self.recipe.clip, norm)
        else:
            for parameter in trained:
                parameter.grad = None
        return float(norm)

    def save(self, folder: Path) -> None:
        """This rank's fragments of weights and optimizer state as safetensors, and what they are fragments of."""
        folder.mkdir(parents=True, exist_ok=True)
        fragments.write(folder, self._fragments(), parallel.rank(), parallel.world())
        if parallel.is_first():
            state = {"steps": self.steps, "world": self.data_world, "zero_stage": self.recipe.zero_stage}
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """What `save` wrote, by any number of ranks under any stage. Raises InputError where it is damaged."""
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            stored, steps = fragments.Stored(folder, state["world"]), state["steps"]
            stored.check(dict(self.objective.get_submodule("model").named_parameters()), bool(steps))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--resume: {folder}: damaged, or no checkpoint of this model: {error}") from error
        with torch.no_grad():
            self._fragments().load(stored, steps)
        stored.restore_random_state(parallel.rank())
        self.steps = steps

    def _fragments(self) -> fragments.Fragments:
        return fragments.of(self._engine, self.objective.get_submodule("model"), self.recipe.zero_stage)

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state dict, on the CPU, on the first rank; empty on all others."""
        import deepspeed

        found: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # tied weights stay one tensor
        for name, value in self.objective.get_submodule("model").state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([value], enabled=self.recipe.zero_stage == 3):
                if parallel.is_first():
                    found[name] = copies.setdefault(id(value), value.detach().to(parallel.HOST, copy=True))
        return found

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self._engine.destroy()


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not. The vision encoder has a rate of its own; what is frozen is left out."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.dim() > 1, f".{PARTS['vision']}" in f".{name}"), []).append(parameter)
    if not groups:
        raise InputError("nothing is trained: every parameter of the model is frozen")
    return [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if is_matrix else 0.0,
            "lr_share": recipe.vision_lr if is_vision else 1.0,
        }
        for (is_matrix, is_vision), parameters in groups.items()
    ]


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """The recipe in DeepSpeed's terms."""
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if recipe.zero_stage >= 2 and recipe.offload:
        zero["offload_optimizer"] = {
            "device": parallel.HOST.type,
            "pin_memory": parallel.device() != parallel.HOST,
        }
    adam = {"lr": recipe.lr, "betas": [0.9, recipe.beta2], "weight_decay": recipe.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": max(1, recipe.streams // (world * recipe.micro_batches)),
        "gradient_accumulation_steps": recipe.micro_batches,
        "gradient_clipping": recipe.clip if recipe.zero_stage else 0.0,
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": recipe.optimizer == "adamw"}},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


def _mean(balance_M: Tensor) -> Tensor:
    return balance_M.mean() if balance_M.numel() else balance_M.sum()
