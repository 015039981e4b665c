"""`python run_guide.py GUIDE`: the commands of docs/train-your-own.md, in order, here, with fewer steps.

Each command has a process of its own, forked off this one, which imports torch and DeepSpeed once for all.
Not run: pip, which needs a network, and TensorBoard, which serves until it is stopped. `SHORTER` is all that differs.
"""

import multiprocessing
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed.run import main as torchrun

import training.run  # noqa: F401  (before the forks)

SHORTER = {"--steps 300": "--steps 2", "--steps 100": "--steps 1"}
NOT_RUN = ("pip", "tensorboard")
FILES = {"yaml": "mixture.yaml"}  # what a block of this language is the content of


def blocks(guide: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", guide, flags=re.M | re.S)


def run_module(name: str, arguments: list[str]) -> None:
    """`python -m name arguments`."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def in_child(run: Callable[..., object], *arguments: object) -> None:
    """Call `run` in a fork of this process; exits where it fails."""
    child = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"exit code {child.exitcode}: {arguments}")


def run_command(command: str) -> None:
    """A line of the shell."""
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        in_child(torchrun, arguments)
    elif program == "python" and arguments[0] == "-m":
        in_child(run_module, arguments[1], arguments[2:])
    elif program not in NOT_RUN:
        raise SystemExit(f"the guide has a command that is not known here: {command}")


def run(guide: str) -> None:
    """All blocks, in order; of JSON, the one that shows a record is data."""
    for language, text in blocks(guide):
        if language == "shell":
            for line in text.splitlines():
                run_command(line)
        elif language == "python":
            in_child(exec, compile(text, "guide", "exec"), {"__name__": "guide"})
        elif language in FILES:
            Path(FILES[language]).write_text(text)


if __name__ == "__main__":
    run(Path(sys.argv[1]).read_text(encoding="utf-8"))
