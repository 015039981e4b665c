"""`python -m training`: train by a recipe."""

from collections.abc import Sequence

from training import cli
from training.assemble import assemble
from training.run import train

DESCRIPTION = """Train SAIL-VL2 by a recipe. One process, or several:

  python -m training --out runs/mine --steps 1000
  torchrun --nproc_per_node=2 -m training --out runs/mine --steps 1000
  python -m training --resume runs/mine

Ctrl-C or SIGTERM writes a checkpoint first. The run's folder holds checkpoints/, metrics.jsonl and model/."""


def main(arguments: Sequence[str]) -> None:
    """Parse, put the parts together, train."""
    recipe, out, start = cli.read(cli.parser("training", DESCRIPTION, out="runs/train"), arguments)
    train(recipe, assemble(recipe, start), out, start)


if __name__ == "__main__":
    cli.run(main)
