"""Attention classes of transformers under attn_implementation="sail", a family for each kind of mask."""

import attention_classes
import pytest
import transformers
from tiny_model import one_thread

KINDS = {
    "llama": "causal",
    "bert": "bidirectional, and a decoder that looks at another sequence",
    "bart": "encoder and decoder",
    "clip": "pictures: no mask",
    "mistral": "sliding windows",
    "llama4": "chunks",
    "align": "a module that does not say whether it is causal",
    "bigbird_pegasus": "a decoder that says it is not causal",
    "t5": "a bias by position",
    "gemma2": "capped scores",
    "gpt_oss": "sinks",
    "deepseek_v3": "values narrower than keys",
    "doge": "a mask of the model's own",
}
COMMITTED = [line.split("\t") for line in attention_classes.RESULT.read_text().splitlines()]


@pytest.mark.parametrize("family", KINDS, ids=list(KINDS))
def test_equal_or_refused(family: str) -> None:
    with one_thread():
        rows = [list(row) for row in attention_classes.walk([family])]
    assert rows and not [row for row in rows if row[2] == "WRONG"]
    if COMMITTED[0][0] == transformers.__version__:
        assert [row[:4] for row in rows] == [row[:4] for row in COMMITTED if row[0] == family]
