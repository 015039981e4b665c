"""Two ranks under every ZeRO stage are one process with plain AdamW; nothing is lost on the way to disk and back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_worker as worker
import pytest
import torch
from torch import Tensor

from sail_model import SailVL2ForConditionalGeneration
from training import parallel
from training.data.batch import collate
from training.engines import fragments
from training.engines.deepspeed import STATE, parameter_groups
from training.errors import InputError
from training.recipes import Recipe

pytestmark = pytest.mark.usefixtures("alone")

BOUND = 2e-6
Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Results of one process, then of two ranks, by case."""
    one = {name: worker.short(recipe, folder / name) for name, recipe in worker.ALONE.items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    unset = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = unset | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, parallel.TIMEOUT_VARIABLE: "60"}
    done = subprocess.run(
        [*launcher, worker.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return one | json.loads((folder / "results.json").read_text())


def by_hand(recipe: Recipe) -> tuple[Steps, dict[str, Tensor]]:
    """The same steps in plain torch, one batch after the other, and the weights behind them."""
    module = worker.supervised(recipe)
    groups = parameter_groups(module, recipe)
    adam = torch.optim.AdamW(groups, betas=(0.9, recipe.beta2))
    trained = [parameter for group in groups for parameter in group["params"]]
    steps = range(worker.steps_of(recipe))
    return [one_step(module, adam, trained, recipe, step) for step in steps], module.model.state_dict()


def one_step(module: Any, adam: Any, trained: list[Tensor], recipe: Recipe, step: int) -> dict[str, Any]:
    """Losses of all ranks' batches, the balance loss of each micro-batch over all of them."""
    rows = [worker.rows_of(step, rank, recipe.micro_batches) for rank in range(worker.RANKS)]
    labels = max(1, sum(collate([row], worker.PAD).labels for mine in rows for row in mine))
    total, balances, counts = torch.zeros(()), [], torch.zeros(())
    for micro_batch in zip(*rows, strict=True):
        outs, tokens = [], 0
        for rank, row in enumerate(micro_batch):
            batch = collate([row], worker.PAD)
            tokens += batch.tokens
            with worker.reaching(worker.own(rank)):
                outs.append(module(batch))
        f_ME = sum(out.counts_ME for out in outs) / tokens
        p_ME = sum(out.prob_sum_ME for out in outs) / tokens
        balances.append(worker.EXPERTS * (f_ME * p_ME).sum(1))
        total, counts = total + sum(out.loss_sum for out in outs) / labels, counts + f_ME * tokens
    balance_M = torch.stack(balances).mean(0)
    adam.zero_grad()
    (total + recipe.balance * balance_M.mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
    for group in adam.param_groups:
        group["lr"] = worker.learning_rate(step) * group["lr_share"]
    adam.step()
    found = {"loss": total.item(), "balance_M": balance_M.tolist(), "grad_norm": norm.item(), "labels": labels}
    return found | {"counts_ME": counts.round().tolist()}


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[Steps, dict[str, Tensor]]]:
    recipes = {"zero": worker.BASE, "frozen": worker.FROZEN, "accumulated": worker.ACCUMULATED, "lora": worker.LORA}
    return {name: by_hand(recipe) for name, recipe in recipes.items()}


def difference(got: Steps, want: Steps) -> float:
    """The largest relative one of loss, balance losses and gradient norm, in any step."""

    def numbers(step: dict[str, Any]) -> list[float]:
        return [step["loss"], step["grad_norm"], *step["balance_M"]]

    pairs = [pair for a, b in zip(got, want, strict=True) for pair in zip(numbers(a), numbers(b), strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)


@pytest.mark.parametrize("case", worker.PARITY)
def test_two_ranks_are_one_process(case: str, found: dict[str, Any], references: dict[str, Any], folder: Path) -> None:
    want, weights = references[case.split("-")[0]]
    got = found[case]["steps"]
    assert [step["counts_ME"] for step in got] == [step["counts_ME"] for step in want]
    assert [step["labels"] for step in got] == [step["labels"] for step in want]
    assert all(step["finite"] for step in got) and difference(got, want) <= BOUND
    assert found[case]["same_as_module"]
    stored = fragments.Stored(folder / case / "engine", worker.RANKS)
    for name in names(stored):
        weight = weights[name]
        saved = stored.read(fragments.WEIGHT, name, 0, weight.numel()).view_as(weight)
        torch.testing.assert_close(saved, weight, msg=lambda text, name=name: f"{name}: {text}")


def names(stored: fragments.Stored) -> set[str]:
    return {key.partition("/")[2] for key in stored._where}


def test_the_fixture_leaves_experts_and_ranks_with_nothing(references: dict[str, Any]) -> None:
    steps, _ = references["zero"]
    counts = torch.tensor([step["counts_ME"] for step in steps])
    assert (counts[..., [3, 7]] == 0).all() and (counts[..., [0, 1, 2, 4, 5, 6]] > 0).any(dim=0).all()
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[3]["labels"] < steps[0]["labels"]
    assert len({step["labels"] for step in steps}) > 2 and all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("fault", worker.WRONG)
def test_a_mistake_exceeds_the_bound_a_hundredfold(
    fault: str, found: dict[str, Any], references: dict[str, Any]
) -> None:
    assert difference(found[fault]["steps"], references["zero"][0][:4]) > 100 * BOUND


@pytest.mark.parametrize("case", [name for name in worker.PARITY if not name.startswith("lora")])
def test_an_export_is_what_was_trained(case: str, found: dict[str, Any], folder: Path) -> None:
    model = SailVL2ForConditionalGeneration.from_pretrained(folder / case / "model", dtype=torch.float32)
    stored = fragments.Stored(folder / case / "engine", worker.RANKS)
    assert names(stored) == {name for name, _ in model.named_parameters()} and found[case]["exported"][0] > 0
    for name, weight in model.named_parameters():
        assert torch.equal(stored.read(fragments.WEIGHT, name, 0, weight.numel()).view_as(weight), weight), name


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("where", ["pixels", "loss"])
def test_a_step_that_is_not_finite_leaves_no_trace(stage: int, where: str, found: dict[str, Any]) -> None:
    got = found[f"not finite {where} {stage}"]
    assert got["finite"] == [[False, False]] * 2 and got["unchanged"] == [True, True] and got["counted"] == 4
    assert got["steps"] == found[f"finite {stage}"]["steps"]


@pytest.mark.parametrize("case", [name for name in worker.SHORT if name.startswith("bfloat16")])
def test_masters_are_float32_and_weights_their_rounding(case: str, found: dict[str, Any], folder: Path) -> None:
    assert found[case]["types"] == ["torch.float32"]
    weights = torch.load(folder / case / "weights.pt")
    stored = fragments.Stored(folder / case / "engine", worker.RANKS)
    finer = 0
    for name in names(stored):
        weight = weights[name]
        master = stored.read(fragments.WEIGHT, name, 0, weight.numel()).view_as(weight)
        assert weight.dtype == torch.bfloat16 and torch.equal(master.bfloat16(), weight), name
        finer += not torch.equal(master, weight.float())
        assert "vision_model" not in name or torch.equal(master, weight.float())
    assert finer > 20


@pytest.mark.parametrize(("case", "start"), worker.resumptions())
def test_a_checkpoint_goes_on(case: str, start: str, found: dict[str, Any], folder: Path) -> None:
    got, want = found[f"{case} from {start}"], found[start]["steps"][worker.SAVED :]
    same_content(folder / start, 1 if start in worker.ALONE else 2, folder / f"{case}-from-{start}", 2)
    if case == start:
        assert got["steps"] == want
    elif case.startswith("float32"):
        assert difference(got["steps"], want) <= BOUND
        assert [step["counts_ME"] for step in got["steps"]] == [step["counts_ME"] for step in want]
    assert got["adam_steps"] == found[start]["adam_steps"] == [worker.SAVED]
    assert len(set(got["random"])) == (2 if start in worker.ALONE else 1)  # of this rank's own, or as it was


@pytest.mark.parametrize(("case", "start"), [("alone-0", "float32-3"), ("alone-2", "float32-1")])
def test_one_process_goes_on_from_two(
    case: str, start: str, found: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    got = worker.resumed(worker.ALONE[case], folder / start, tmp_path)
    same_content(folder / start, 2, tmp_path, 1)
    assert difference(got["steps"], found[start]["steps"][worker.SAVED :]) <= BOUND


@pytest.mark.parametrize("case", ["float32-1", "float32-2", "float32-3"])
def test_moments_do_not_depend_on_the_stage(case: str, found: dict[str, Any], folder: Path) -> None:
    got, want = (fragments.Stored(folder / name / "engine", worker.RANKS) for name in (case, "float32-0"))
    for key in want._where:
        kind, _, name = key.partition("/")
        size = sum(last - first for first, last, _ in want._where[key])
        torch.testing.assert_close(got.read(kind, name, 0, size), want.read(kind, name, 0, size))
    assert found[case]["adam_steps"] == [worker.SAVED]


def same_content(a: Path, a_world: int, b: Path, b_world: int) -> None:
    """Masters and moments of every parameter, bit for bit."""
    one, two = fragments.Stored(a / "engine", a_world), fragments.Stored(b / "engine", b_world)
    assert one._where.keys() == two._where.keys()
    for key, spans in one._where.items():
        kind, _, name = key.partition("/")
        size = sum(last - first for first, last, _ in spans)
        assert torch.equal(one.read(kind, name, 0, size), two.read(kind, name, 0, size)), key


DAMAGE = {
    "no folder": lambda at: shutil.rmtree(at),
    "no state": lambda at: (at / STATE).unlink(),
    "state cut short": lambda at: (at / STATE).write_text('{"steps": 3'),
    "state of something else": lambda at: (at / STATE).write_text("[]"),
    "state without steps": lambda at: (at / STATE).write_text('{"world": 2}'),
    "a rank missing": lambda at: (at / fragments.file_name(1, 2)).unlink(),
    "a file cut short": lambda at: os.truncate(at / fragments.file_name(0, 2), 100_000),
    "an empty file": lambda at: (at / fragments.file_name(1, 2)).write_bytes(b""),
    "a file twice": lambda at: shutil.copy(at / fragments.file_name(0, 2), at / fragments.file_name(1, 2)),
    "no moments": lambda at: without(at / fragments.file_name(1, 2), "exp_avg_sq"),
}


def without(path: Path, kind: str) -> None:
    """The file, written once more without values of that kind."""
    with fragments.safe_open(path, framework="pt") as file:
        starts = json.loads(file.metadata()["starts"])
        tensors = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(kind + "/")}  # noqa: SIM118
    metadata = {"starts": json.dumps({key: start for key, start in starts.items() if key in tensors})}
    fragments.save_file(tensors, path, metadata=metadata)


@pytest.fixture(scope="module")
def engine(found: dict[str, Any]) -> Iterator[worker.DeepSpeedEngine]:
    made = worker.engine_of(worker.ALONE["alone-2"])
    yield made
    made.close()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_changes(
    damage: str, engine: worker.DeepSpeedEngine, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "float32-2" / "engine", tmp_path / "engine")
    DAMAGE[damage](tmp_path / "engine")
    before = worker.held(engine)
    with pytest.raises(InputError, match=r"--resume: .*engine: damaged, or no checkpoint of this model: ") as error:
        engine.load(tmp_path / "engine")
    assert "\n" not in str(error.value) and engine.steps == 0
    after = worker.held(engine)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_checkpoint_of_another_model_is_refused(engine: worker.DeepSpeedEngine, folder: Path) -> None:
    with pytest.raises(InputError, match=r"exp_avg/.*: 19200 elements wanted, stored are none"):
        engine.load(folder / "lora-2" / "engine")


@pytest.mark.parametrize(("optimizer", "kind"), [(torch.optim.AdamW, Tensor), (torch.optim.Optimizer, int)])
def test_the_step_count_is_of_the_optimizers_own_type(optimizer: type, kind: type) -> None:
    """torch's AdamW counts in a tensor, DeepSpeed's CPU Adam in an int that its compiled code takes."""
    weight = torch.zeros(3)
    made = optimizer([weight], {}) if optimizer is torch.optim.Optimizer else optimizer([weight])
    state = fragments.make_state(made, weight, 7)
    assert type(state["step"]) is kind and int(state["step"]) == 7
    assert made.state[weight] is state and all(torch.equal(state[key], weight) for key in fragments.MOMENTS)


@pytest.mark.parametrize("options", [{"zero_stage": 1}, {"offload": False}])
def test_deepspeeds_adam_is_refused_where_it_would_be_another(options: dict[str, Any]) -> None:
    """Without offload DeepSpeed takes its FusedAdam, whose step count no fragment has."""
    with pytest.raises(InputError, match="optimizer: got 'deepspeed_cpu_adam', want it with offload"):
        Recipe(optimizer="deepspeed_cpu_adam", **options)
