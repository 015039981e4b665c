"""`python -m training.soup OUT FOLDER FOLDER...`: the average of models in Hugging Face's layout (model soup).

The report averages checkpoints of one run (homogeneous: 74.91 and 74.54 points became 76.60); models of different
runs lie in different basins, and their average gave 12.86 where each had 75.
Sources: SAIL-VL2 report (arXiv 2509.14033), section 4.4; Model soups (arXiv 2203.05482).
"""

import json
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.checkpoint import replace_folder
from training.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# what gives the weights' numbers their meaning, and so must agree
MEANING = ("config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")
# of config.json at any depth, what says how a model was made and loaded, not what it is; tensors say their dtypes
HISTORY = ("_name_or_path", "transformers_version", "dtype")
# where one run's exports agree almost everywhere: a larger relative distance is said
FAR = 0.5


class Weights:
    """The tensors of one folder, read one at a time. Raises InputError where the folder holds no safetensors."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SINGLE).is_file():
            names = None
        else:
            raise InputError(f"{folder}: got no {SINGLE} and no {INDEX}, want a folder that save_pretrained wrote")
        files = sorted(set(names.values())) if names else [SINGLE]
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise InputError(f"{folder}: {INDEX} names {missing[0]}, which is not there")
        self._open = {file: stack.enter_context(safe_open(str(folder / file), "pt")) for file in files}
        self.file_of = {name: file for file, opened in self._open.items() for name in opened.keys()}  # noqa: SIM118
        self.files = files

    def form(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype of a tensor, without reading it."""
        entry = self._open[self.file_of[name]].get_slice(name)
        return entry.get_shape(), entry.get_dtype()

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._open[self.file_of[name]].get_tensor(name)
        return tensor


def soup(out: Path, folders: Sequence[Path], weights: Sequence[float] | None = None) -> list[str]:
    """sum_i w_i theta_i / sum_i w_i for every tensor, in fp64, rounded once to the dtype of the first folder.

    `out` gets shards like those of the first folder, and its config, tokenizer and processor. In memory at a time: one
    shard, and one tensor of another folder. Written aside and renamed: `out` is whole or not there. Returns warnings.
    Raises InputError for fewer than two folders, weights that do not fit, an `out` that exists, and folders that differ
    in config, tokenizer, names, shapes or dtypes; the message names the first difference.
    """
    shares = _shares(folders, weights)
    if out.exists():
        raise InputError(f"{out}: exists already; give the average a new folder")
    with ExitStack() as stack:
        sources = [Weights(folder, stack) for folder in folders]
        for source in sources[1:]:
            _same_meaning(sources[0].folder, source.folder)
            _same_tensors(sources[0], source)
        aside = out.with_name(f".writing-{out.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        distance = [0.0] * len(sources)
        for file in sources[0].files:
            shard = dict(_averages(sources, shares, file, distance))
            save_file(shard, str(aside / file), metadata={"format": "pt"})
    _copy_rest(folders[0], aside, set(sources[0].files))
    replace_folder(aside, out)
    return [
        f"{folder}: differs from {folders[0]} by {far:.0%} of its weights' norm; the average of models of different "
        "runs is worse than each"
        for folder, far in zip(folders, distance, strict=True)
        if far > FAR
    ]


def _shares(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len(folders) < 2:
        raise InputError(f"soup: got {len(folders)} folder, want at least 2 to average")
    weights = [1.0] * len(folders) if weights is None else weights
    if len(weights) != len(folders) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(
            f"--weights: got {list(weights)} for {len(folders)} folders, want one for each, none negative, not all 0"
        )
    return [weight / sum(weights) for weight in weights]


def _averages(
    sources: Sequence[Weights], shares: Sequence[float], file: str, distance: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """The averaged tensors of one shard; `distance` collects each folder's largest relative distance to the first.

    A buffer that counts in integers has no average: it must be the same in all folders.
    """
    for name in (name for name, where in sources[0].file_of.items() if where == file):
        first = sources[0].read(name)
        total = first.double() * shares[0]
        size = first.double().norm()
        for i, source in enumerate(sources[1:], start=1):
            other = source.read(name)
            if not first.is_floating_point() and not torch.equal(first, other):
                raise InputError(f"{source.folder}: {name}: integers differ from those of {sources[0].folder}")
            if first.dim() > 1 and size > 0:
                distance[i] = max(distance[i], float((other.double() - first.double()).norm() / size))
            total.add_(other.double(), alpha=shares[i])
        yield name, total.to(first.dtype) if first.is_floating_point() else first


def _same_tensors(first: Weights, other: Weights) -> None:
    if differing := sorted(first.file_of.keys() ^ other.file_of.keys()):
        has, lacks = (first, other) if differing[0] in first.file_of else (other, first)
        raise InputError(f"{lacks.folder}: has no tensor {differing[0]}, {has.folder} has; want one architecture")
    for name in first.file_of:
        if first.form(name) != other.form(name):
            raise InputError(
                f"{other.folder}: {name}: got {other.form(name)}, but {first.folder} has {first.form(name)}; "
                "want the same shape and dtype"
            )


def _same_meaning(first: Path, other: Path) -> None:
    for name in MEANING:
        one, two = (_content(folder / name) for folder in (first, other))
        if one == two:
            continue
        if one is None or two is None:
            raise InputError(f"{other}: {name} is in only one of it and {first}; want both or none")
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                raise InputError(f"{other}: {name}: {key} differs from that of {first}; want the same model")


def _content(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    read: dict[str, Any] = json.loads(
        path.read_text(encoding="utf-8"),
        object_hook=lambda found: {key: value for key, value in found.items() if key not in HISTORY},
    )
    return read


def _copy_rest(folder: Path, out: Path, shards: set[str]) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name not in shards and path.suffix not in (".bin", ".pt", ".pth"):
            shutil.copy2(path, out / path.name)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m training.soup", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="model that save_pretrained wrote")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each folder; by default all are equal")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Average, and say what is doubtful."""
    options = _parse(arguments)
    for warning in soup(options.out, options.folders, options.weights):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {options.out}: the average of {len(options.folders)} models")


if __name__ == "__main__":
    from training import cli

    cli.run(main)
