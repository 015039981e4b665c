"""docs/train-your-own.md does what it says, on 24 pictures, with fewer steps."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_guide
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM

from sail_model import train_tokenizer
from training.data.mixture import open_data

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "train-your-own.md"
TEXT = GUIDE.read_text(encoding="utf-8")
COLORS = ("red", "blue", "green")


def write_data(folder: Path) -> None:
    """captions.jsonl with its pictures, the guide's record first; table.parquet; a language model, and the encoder."""
    (folder / "pictures").mkdir()
    (record,) = (json.loads(text) for language, text in run_guide.blocks(TEXT) if language == "json")
    lines, rows = [], []
    for number in range(24):
        color = COLORS[number % 3]
        image, data = Image.new("RGB", (48 + number, 64), color), io.BytesIO()
        image.save(folder / "pictures" / f"{number}.png")
        image.save(data, "PNG")
        record["images"], record["messages"][1]["content"] = [f"pictures/{number}.png"], color
        lines.append(json.dumps(record))
        rows.append({"image": data.getvalue(), "question": "what color is it?", "answer": color})
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    tokenizer = train_tokenizer(["what color is it?", *COLORS], 340)
    tokenizer.save_pretrained(folder / "qwen3")
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    config = Qwen3Config(**sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    (folder / "encoder").symlink_to("runs/mine/model")  # any SAIL-VL2 is one


def commands() -> list[list[str]]:
    shells = [text for language, text in run_guide.blocks(TEXT) if language == "shell"]
    return [shlex.split(line) for text in shells for line in text.splitlines()]


@pytest.mark.slow
def test_the_guide(tmp_path: Path) -> None:
    write_data(tmp_path)
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, run_guide.__file__, str(GUIDE)], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert len(open_data(str(tmp_path / "shards")).sources[0]) == 24
    for name in ("mine", "two", "lora", "parts"):
        assert (tmp_path / "runs" / name / "model" / "model.safetensors").is_file(), name
    assert list((tmp_path / "runs" / "mine" / "tensorboard").glob("events.out*"))
    steps = [json.loads(line)["loss"] for line in (tmp_path / "runs" / "mine" / "metrics.jsonl").open()]
    both = [json.loads(line)["loss"] for line in (tmp_path / "runs" / "two" / "metrics.jsonl").open()]
    assert both == pytest.approx(steps, rel=2e-6), "of one process and of two"
    assert (tmp_path / "runs" / "soup" / "model.safetensors").is_file()


def test_the_guide_is_short_and_shortened_where_it_says() -> None:
    until_the_answer = [language for language, _ in run_guide.blocks(TEXT)]
    first = TEXT[: TEXT.index("```python")]
    assert "python" in until_the_answer and sum(language == "shell" for language, _ in run_guide.blocks(first)) <= 10
    assert len(TEXT.splitlines()) <= 130
    assert all(long in TEXT for long in run_guide.SHORTER)
    trained = [line for line in commands() if "training" in line and "--resume" not in line]
    assert len(trained) == 4 and all("--steps" in line for line in trained)
