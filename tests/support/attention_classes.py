"""Every attention class of the installed transformers under attn_implementation="sail": equal to eager, or refused.

    python tests/support/attention_classes.py [--write] [FAMILY ...]

A family is a folder of transformers/models. Its models are built tiny and random (tiny_transformers.py) and run without
padding, with padding on either side, on a filled cache, as a decoder that looks at another sequence, and with windows
narrower than the text, until every class that calls `ALL_ATTENTION_FUNCTIONS` has been run. The verdict on a class:
    equal     what was computed is eager's, by the accuracy rule; other inputs may be refused
    refused   nothing but ValueErrors that name what has no kernel
    raises    another error, in transformers' own code: a class beside these adds the mask to its scores by itself
    WRONG     another result in any case: the exit status is 1
    unreached no tiny model of this recipe gets there in eager either; the reason follows
"""

import argparse
import copy
import importlib
import inspect
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import tiny_transformers as tiny
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from sail_ops.integrations.transformers import register
from sail_ops.integrations.transformers.attention import sail_attention_forward
from sail_ops.testing import CHANCE, assert_accurate

RESULT = Path(__file__).with_name("attention_classes.tsv")
MODELS = Path(transformers.__file__).parent / "models"
MEMORY = 6 << 30  # bytes: a model that this recipe leaves large fails by itself, and is reported
REFUSAL = 'attn_implementation="sail": got'


class Scenario(NamedTuple):
    """Inputs of one comparison; `real` are the tokens of the output that count, `steps` a prompt and then one token."""

    name: str
    inputs: dict[str, Any]
    real: Tensor | None = None
    steps: bool = False


class Row(NamedTuple):
    """The verdict on one attention class; `cases` are those that were equal, `reason` why others were not."""

    family: str
    name: str
    verdict: str
    cases: str
    reason: str


@dataclass
class Verdicts:
    """What each attention class did, by case, and what eager itself could not run."""

    equal: dict[str, set[str]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    raised: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def row(self, family: str, name: str) -> Row:
        cases = sorted(self.equal.get(name, ()))
        refusals = self.refused.get(name, {})
        reason = "; ".join(f"{case}: {why}" for case, why in sorted(refusals.items()) if case not in cases)
        if name in self.wrong:
            return Row(family, name, "WRONG", ", ".join(cases), self.wrong[name])
        if name in self.raised:
            return Row(family, name, "raises", ", ".join(cases), self.raised[name])
        if cases or refusals:
            return Row(family, name, "equal" if cases else "refused", ", ".join(cases), reason)
        return Row(family, name, "unreached", "", "; ".join(self.errors[:3]) or "no model calls it")


def scenarios(model: PreTrainedModel) -> Iterator[Scenario]:
    inputs = tiny.random_inputs(model)
    parameters = inspect.signature(model.forward).parameters
    plain = {"use_cache": False} if "use_cache" in parameters else {}
    yield Scenario("plain", {**inputs, **plain})
    if "input_ids" not in inputs or "attention_mask" not in parameters:
        return
    crossed = "decoder_input_ids" in inputs  # the padding is the source's, the output the target's
    for side in ("right", "left"):
        real = torch.arange(tiny.TEXT) < torch.tensor([tiny.TEXT, tiny.TEXT - 4])[:, None]
        real = real.flip(1) if side == "left" else real
        padded = {**inputs, "attention_mask": real.long()}
        yield Scenario(f"{side} padding", padded | plain, None if crossed else real)
    if "past_key_values" in parameters:
        yield Scenario("cache", padded, steps=True)


def output(model: PreTrainedModel, scenario: Scenario) -> Tensor:
    """The first floating-point tensor that the model returns, of the real tokens; of the last one after a prompt."""
    inputs = dict(scenario.inputs)
    with torch.no_grad():
        if scenario.steps:
            of = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
            mask = inputs["attention_mask"] if of != "input_ids" else inputs["attention_mask"][:, :-1]
            prompt = inputs | {of: inputs[of][:, :-1], "attention_mask": mask, "use_cache": True}
            cache = model(**prompt).past_key_values
            inputs |= {of: inputs[of][:, -1:], "past_key_values": cache, "use_cache": True}
        out = model(**inputs)
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]
    first = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    real = scenario.real
    return first[real] if real is not None and first.shape[:2] == real.shape else first


def reference(
    model: PreTrainedModel, scenario: Scenario, dtype: torch.dtype, names: tuple[str, ...] = ("eager", "sdpa")
) -> Tensor:
    """By eager attention, or by sdpa where eager makes NaN of queries that see no key."""
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.dtype.is_floating_point else v
              for k, v in scenario.inputs.items()}  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        for name in names:
            model.set_attn_implementation(name)
            out = output(model, scenario._replace(inputs=inputs))
            if out.isfinite().all():
                return out
        raise ArithmeticError("neither eager nor sdpa is finite")
    finally:
        torch.set_default_dtype(torch.float32)


def judge(model: PreTrainedModel, scenario: Scenario, verdicts: Verdicts, prefix: str) -> None:
    """One comparison, into `verdicts`."""
    case = prefix + scenario.name
    try:
        base = reference(model, scenario, torch.float32)
        exact = reference(copy.deepcopy(model).double(), scenario, torch.float64)
    except Exception as error:  # of theirs, whatever it is: nothing to compare with
        verdicts.errors.append(brief(model, case, error))
        return
    called: dict[str, None] = {}  # names in order; the last is the one that raised

    def implementation(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called[type(module).__name__] = called.pop(type(module).__name__, None)
        return sail_attention_forward(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sail", implementation)
    try:
        model.set_attn_implementation("sail")
        out = output(model, scenario)
    except Exception as error:
        last = [*called][-1:] or [type(model).__name__]
        if isinstance(error, ValueError) and REFUSAL in str(error):
            why = str(error).partition(REFUSAL + " ")[2].partition(", which")[0]
            verdicts.refused.setdefault(last[0], {})[case] = why
        else:
            verdicts.raised[last[0]] = brief(model, case, error)
        return
    finally:
        register()
    try:
        assert_accurate(out, exact, base, k=CHANCE)
    except AssertionError as error:
        if not as_sdpa(model, scenario, out):
            verdicts.wrong |= dict.fromkeys(called, brief(model, case, error))
            return
        case += " as sdpa"
    for name in called:
        verdicts.equal.setdefault(name, set()).add(case)


def as_sdpa(model: PreTrainedModel, scenario: Scenario, out: Tensor) -> bool:
    """Whether it is sdpa's result: eager's differs for parts called without the mask that the whole gives them."""
    base = reference(model, scenario, torch.float32, ("sdpa",))
    exact = reference(copy.deepcopy(model).double(), scenario, torch.float64, ("sdpa",))
    try:
        assert_accurate(out, exact, base, k=CHANCE)
    except AssertionError:
        return False
    return True


def brief(model: PreTrainedModel | type, where: str, error: BaseException) -> str:
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    return f"{name}, {where}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def attention_classes(module: ModuleType) -> set[str]:
    """Names of the modules that call the attention interface."""
    return {n for n, c in own_classes(module, nn.Module).items() if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(c)}


def own_classes(module: ModuleType, base: type) -> dict[str, Any]:
    found = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    return {n: c for n, c in found.items() if c.__module__ == module.__name__}


def models(module: ModuleType) -> list[type[PreTrainedModel]]:
    """The family's models, those without heads first, short ones before those made of them."""
    found = [c for n, c in own_classes(module, PreTrainedModel).items() if not n.endswith("PreTrainedModel")]
    found = [c for c in found if c.config_class is not None]
    return sorted(found, key=lambda m: ("For" in m.__name__, len(inspect.getsource(m))))


def variants(model_class: type[PreTrainedModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a configuration: windows that hold the text, narrower ones, a decoder that looks at another sequence."""
    yield "", {}
    fields = inspect.signature(model_class.config_class.__init__).parameters
    if "sliding_window" in fields or "attention_chunk_size" in fields or hasattr(
        getattr(model_class.config_class(), "text_config", None), "sliding_window"
    ):  # fmt: skip
        yield "narrow ", {"window": 4}
    if "is_decoder" in fields and "add_cross_attention" in fields:
        yield "crossed ", {"is_decoder": True, "add_cross_attention": True}


def walk_module(family: str, module: ModuleType) -> list[Row]:
    wanted, verdicts = attention_classes(module), Verdicts()
    for model_class in models(module):
        if all(name in verdicts.equal for name in wanted):
            break
        for prefix, options in variants(model_class):
            try:
                torch.manual_seed(0)
                model = tiny.lively(model_class(tiny.tiny_config(model_class.config_class, **options)))
                cases = list(scenarios(model))
            except Exception as error:  # no tiny model by this recipe: reported as unreached
                verdicts.errors.append(brief(model_class, f"{prefix}built", error))
                continue
            for scenario in cases:
                judge(model, scenario, verdicts, prefix)
    return [verdicts.row(family, name) for name in sorted(wanted | verdicts.wrong.keys() | verdicts.raised.keys())]


def walk(families: list[str]) -> Iterator[Row]:
    """All families, where none is named."""
    register()
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        family = path.parent.name
        if "ALL_ATTENTION_FUNCTIONS" in path.read_text() and family in (families or [family]):
            try:
                module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
            except ImportError as error:  # of a package that is not here
                yield Row(family, path.stem, "unreached", "", f"not imported: {error}")
            else:
                yield from walk_module(family, module)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"put the result into {RESULT.name}")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rows = []
    for row in walk(arguments.families):
        rows.append(row)
        print("\t".join(row), flush=True)
    counts = Counter(row.verdict for row in rows)
    print(f"transformers {transformers.__version__}: {dict(counts)}")
    if arguments.write:
        head = (transformers.__version__, *Row._fields[1:])
        lines = (head, *((*row[:-1], row.reason[:160].rstrip()) for row in rows))
        RESULT.write_text("".join("\t".join(line) + "\n" for line in lines))
    return bool(counts["WRONG"])


if __name__ == "__main__":
    sys.exit(main())
