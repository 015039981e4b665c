"""The file that a demo run leaves: whole or not there, kept beside the benchmarks of its device, and its one answer."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import report
from training import checkpoint, demo, results
from training.data.formats import conversation_of
from training.errors import InputError


def found(blank: bool = False) -> dict[str, Any]:
    return {"device": "cpu-a-brand-avx2-2t", "recipe": [{"blank_pictures": blank}], "exact_match": {}}


def test_a_crash_leaves_the_results_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.write(tmp_path, {"run": 1})

    def crash(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "flush", crash)
        with pytest.raises(KeyboardInterrupt):
            results.write(tmp_path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}
    results.write(tmp_path, {"run": 3})
    assert json.loads(path.read_text()) == {"run": 3} and list(tmp_path.iterdir()) == [path]


def test_results_are_kept_by_device_and_the_blank_ones_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    for name, blank in (("seeing", False), ("blind", True)):
        (tmp_path / name).mkdir()
        results.write(tmp_path / name, found(blank))
    results.main([str(tmp_path / "seeing"), str(tmp_path / "blind")])
    folder = tmp_path / "kept" / "cpu-a-brand-avx2-2t"
    assert capsys.readouterr().out.split() == [str(folder / "demo.json"), str(folder / "demo-blank.json")]
    assert json.loads((folder / "demo.json").read_text()) == found()
    assert json.loads((folder / "demo-blank.json").read_text()) == found(blank=True)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "kept")
    assert report.show(folder.name) == 1, "these are no benchmarks, whose tables it prints"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_what_are_no_results_is_not_kept(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json: want the results of a demo run"):
        results.keep(tmp_path)
    with pytest.raises(InputError, match="want the folders"):
        results.main([])


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path / "inner")
    git = ["git", "-C", str(tmp_path / "inner"), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "inner").mkdir()
    assert results.commit() is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert results.commit() is None, "no commit yet"
    (tmp_path / "inner" / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    clean = results.commit()
    assert clean is not None and len(clean["id"]) == 40 and clean["dirty"] is False
    (tmp_path / "inner" / "file").write_text("2")
    assert results.commit() == {"id": clean["id"], "dirty": True}


def test_the_answer_shown_is_about_a_picture_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    monkeypatch.setattr(demo, "answer_from_disk", lambda folder, picture, question: f"{picture.size} {question}")
    records = [
        conversation_of({"picture": name, "questions": [[f"of {name}?", "this"]]}, tmp_path, name)
        for name in ("missing.png", "cut.png", "good.png")
    ]
    assert (
        demo.one_answer(tmp_path, records) == "good.png\n  of good.png?  ->  (8, 8) of good.png?   (right answer: this)"
    )
    assert demo.one_answer(tmp_path, records[:2]) == "no held-out picture can be read: no question to answer"
