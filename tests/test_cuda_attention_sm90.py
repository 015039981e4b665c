"""The sm_90a attention forward on an emulated Hopper (cuda_emulation/ptx_sm90.h): turns, tails, packs, neighbors."""

import re
from pathlib import Path

import emulated
import pytest
import torch
from cuda_attention import DTYPES, Case, assert_accurate, forward, inputs

pytestmark = pytest.mark.cpu_only  # it emulates a card whatever runs the operators

SOURCE = emulated.EMULATION / "attention_sm90.cpp"

# Blocks are 128 rows, 192 where D is 64, against tiles of 128 keys.
CASES = {
    "one": Case(((1, 1),), B=1),
    "tiles": Case(((192, 256),), D=64, B=1),
    "full": Case(((70, 90),), H=2, G=2, D=96, causal=False, B=2),
    "tails": Case(((131, 197),), D=128, B=1),
    "many_tiles": Case(((40, 1100),), H=1, D=64, B=1),  # slots are used again
    "fewer_keys": Case(((150, 67),), D=72, B=1),  # the first queries see nothing
    "group": Case(((40, 175),), H=6, G=2, D=80, B=1),
    "gaps": Case(((33, 150),), H=2, G=2, D=64, B=2, gap=24),
    "negative_scale": Case(((40, 170),), D=64, B=1, scale=-0.2),
    "zero_scale": Case(((40, 70),), D=64, B=1, scale=0.0),
    "pack": Case(((37, 37), (0, 5), (1, 1), (5, 0), (0, 0), (230, 330), (3, 290), (60, 20)), D=64),
    "full_pack": Case(((37, 50), (0, 5), (1, 1), (5, 0), (90, 130)), H=4, G=2, D=128, causal=False),
    "odd_pack": Case(((140, 140), (9, 300), (20, 20)), H=2, G=1, D=72),
    "many_sequences": Case(tuple((i % 3, 20 + i % 4) for i in range(40)), H=1, D=80, causal=False),
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_accuracy(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    x = inputs(CASES[name], dtype)
    assert_accurate(forward(library, CASES[name], x, seed=len(name)), CASES[name], x)
