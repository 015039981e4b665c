"""`make gpu-check` without a card: what ends a stage and a run, what is left of it, and all of it on the emulator."""

import json
import math
import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import check
import contact
import contact_pieces
import pytest
import torch
from check_report import LOG, MOST_FILES, Report
from conftest import DEVICE
from contact_pieces import Card, Case, Piece
from stages import BENCHMARKS, ROOT, TRITON_SUITES, Stage, stages

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="it emulates a card whatever runs the operators")
HANGS = "import time; time.sleep(600)"
RAISES = partial(operator.truediv, 1, 0)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]


def code(text: str, **changes: Any) -> Stage:
    return Stage([sys.executable, "-c", text], **changes)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the card says when it is asked, in turn; "ok" at the end of the list."""
    queue: list[str] = []
    monkeypatch.setattr(contact, "alone", lambda *_: queue.pop(0) if queue else "ok")
    return queue


def run(todo: dict[str, Stage], folder: Path, budget: float = math.inf) -> tuple[int, Report]:
    report = Report(folder)
    return check.run_all(todo, report, dict(os.environ), time.monotonic() + budget, RAISES), report


# ---- stages
def test_every_file_is_there_and_every_stage_once() -> None:
    named = [word for stage in stages().values() for word in stage.command if word.endswith(".py")]
    assert len(named) > 20 and [word for word in named if not (ROOT / word).exists()] == []
    assert list(stages())[:3] == ["what is built", "contact", "headlines"]
    assert list(stages(compiled=False))[1:] == [f"Triton, {name}" for name in TRITON_SUITES]
    assert len(BENCHMARKS) + 2 <= MOST_FILES  # each family's results beside two files


def test_triton_runs_the_suites_of_its_interpreter() -> None:
    import test_triton_numerics

    assert sorted(sum(TRITON_SUITES.values(), [])) == sorted(test_triton_numerics.FILES)


def test_list_and_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--list", "--only", "^contact", "--only", "memcheck"]) == 0
    assert capsys.readouterr().out == "  120 s  contact\n  900 s  compute-sanitizer memcheck\n"
    with pytest.raises(SystemExit, match="--only: got 'nothing', which none of these has: what is built, contact, "):
        check.main(["--list", "--only", "contact", "--only", "nothing"])


def test_a_stage_is_ok_or_failed_or_skipped(
    tmp_path: Path, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    todo = {
        "good": code("print('of no interest')"),
        "shown": code("print('one'); print('the verdict')", shown=1),
        "bad": code("print('why'); exit(3)"),
        "no tool": Stage(["no-such-sanitizer"]),
        "no module": code("", needs="import no_such_module"),
    }
    failed, report = run(todo, tmp_path)
    assert failed == 1
    assert list(report.statuses.values()) == ["ok", "ok", "FAILED", "skipped", "skipped"]
    said = capsys.readouterr().out
    assert (
        "of no interest" not in said and "one" not in said.split() and "\nthe verdict\n" in said and "\nwhy\n" in said
    )
    want = "gpu-check: 2 of 5 stages without a failure; FAILED: bad; skipped: no tool, no module"
    assert said.splitlines()[-1] == want
    assert lines(tmp_path)[-1] == {"verdict": want, "partial": False}
    assert "of no interest" in report.log.read_text()


def test_a_stage_that_hangs_ends_with_its_children_and_the_next_runs(
    tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, number: (groups.append(group), kill(group, number)))
    todo = {"hangs": Stage(["sh", "-c", "sleep 600 & wait"], limit=0.5), "next": code("")}
    failed, report = run(todo, tmp_path)
    assert failed == 1 and list(report.statuses.values()) == ["timed out", "ok"]
    assert lines(tmp_path)[-1]["partial"] is True
    deadline = time.monotonic() + 60
    while alive_in(groups[0]):
        assert time.monotonic() < deadline, "a child outlived its stage"
        time.sleep(0.02)


def alive_in(group: int) -> list[str]:
    """Processes of the group that are more than a zombie, which one is where nobody waits for it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may end as it is read
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if int(its_group) == group and state != "Z" else []
    return found


def test_measurements_of_a_stage_that_ends_early_are_partial(tmp_path: Path, answers: list[str]) -> None:
    ends = "import os, sys; open(sys.argv[2], 'w').write('{\"ms\": 3}\\n{\"m'); os._exit(9)"
    run({"measures": code(ends, measures=True)}, tmp_path)
    _, first, half, _ = lines(tmp_path)
    assert first == {"stage": "measures", "partial": True, "ms": 3}
    assert half == {"stage": "measures", "partial": True, "unreadable": '{"m'}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.jsonl"]


def test_a_budget_that_runs_out(tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage under way gets what is left, the others are named."""
    monkeypatch.setattr(check, "LEAST", 0.1)
    todo = {"hangs": code(HANGS), "second": code(""), "third": code("")}
    failed, report = run(todo, tmp_path, 1)
    assert failed == 1 and list(report.statuses.values()) == ["timed out", "no time left", "no time left"]
    assert lines(tmp_path)[-1] == {
        "verdict": "gpu-check: 0 of 3 stages without a failure; timed out: hangs; no time left: second, third",
        "partial": True,
    }
    assert next(line["limit"] for line in lines(tmp_path) if line.get("stage") == "hangs") <= 1
    assert run({"none": code("")}, tmp_path, 0)[0] == 1, "a run of nothing is no success"


def test_a_card_that_is_silent_ends_the_run(tmp_path: Path, answers: list[str]) -> None:
    answers += ["ok", "timed out"]
    todo = {"first": code(""), "second": code(""), "skipped": Stage(["none"]), "fourth": code("")}
    failed, report = run(todo, tmp_path)
    assert failed == 1 and list(report.statuses.values()) == ["ok", "ok", "not run", "not run"]
    verdict = "2 of 4 stages without a failure; not run: skipped, fourth; the card does not answer after: second"
    assert lines(tmp_path)[-1] == {"verdict": f"gpu-check: {verdict}", "partial": True}


def test_a_run_that_is_terminated_says_what_it_has(tmp_path: Path, answers: list[str]) -> None:
    before = signal.signal(signal.SIGTERM, check.terminated)
    ends = f"import os; os.kill(os.getppid(), {int(signal.SIGTERM)}); {HANGS}"
    try:
        with pytest.raises(SystemExit, match="ended by SIGTERM"):
            run({"first": code(""), "second": code(ends), "third": code("")}, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    want = "gpu-check: 1 of 3 stages without a failure; interrupted: second; not run: third"
    assert lines(tmp_path)[-1] == {"verdict": want, "partial": True}


def test_a_test_that_hangs_has_a_limit_where_pytest_knows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (True, False):
        monkeypatch.setattr(check, "runs", lambda *_, known=known: known)
        command = check.command_of(stages()["graphs, streams, memory"], {}, 100, Path("none"))
        assert ("--timeout=120" in command) == known
    contact_command = check.command_of(stages()["contact"], {}, 100, Path("here"))
    assert contact_command[-4:] == ["--out", "here", "--budget", "90.0"]


def test_wheels_are_wheels(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="SAIL_WHEELS: got '.*', which has no wheels, want a folder of them"):
        check.unpacked(tmp_path)


@pytest.mark.parametrize("triton", [True, False], ids=["with_triton", "without"])
def test_neither_library_nor_nvcc(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[str],
    triton: bool,
) -> None:
    def ended(name: str, stage: Stage, report: Report, *_: Any) -> None:
        report.ended(name, "ok")

    monkeypatch.setattr(check, "LIBRARY", Path("/none/libsail_ops_cuda.so"))
    monkeypatch.setattr(check.shutil, "which", lambda _: None)
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    monkeypatch.setattr(check, "run", ended)
    if not triton:
        with pytest.raises(SystemExit, match="no nvcc to build it, and Triton is not installed"):
            check.main(["--out", str(tmp_path)])
        return
    assert check.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "gpu-check: 3 of 3 stages without a failure;"
        " Triton alone: libsail_ops_cuda.so is missing and there is no nvcc to build it"
    )


# ---- what is left of a run
def test_the_terminal_keeps_room_for_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path)
    for number in range(300):
        report.ended(f"stage {number}", "FAILED", reason="x" * 500)
    report.statuses = {f"a stage of some length, {number}": "skipped" for number in range(40)}
    verdict = report.verdict()
    said = capsys.readouterr().out
    assert 9_000 < len(said) < 12_000 and said.splitlines()[-1] == verdict


def test_the_log_keeps_both_ends_of_a_long_output(tmp_path: Path) -> None:
    report = Report(tmp_path)
    before = report.begin("==== before")
    begin = report.begin("==== long")
    with report.log.open("a") as file:
        file.write("first\n" + "x" * 3 * LOG + "\nlast\n")
    report.trim(begin)
    text = report.log.read_text()
    assert text.startswith("==== before\n==== long\nfirst\nxx") and text.endswith("x\nlast\n")
    assert f"[{2 * LOG + 12} bytes left out]" in text and len(text) < LOG + 200 and before < begin
    assert report.output(begin, 1) == "last"


def test_the_folder_holds_what_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "out")
    made = [tmp_path / f"{number}.json" for number in range(7)]
    for path in made:
        path.write_text(path.name)
    report.keep(made)
    report.keep(made[:1])
    assert len(list(report.folder.iterdir())) == MOST_FILES and (report.folder / "0.json").read_text() == "0.json"
    assert "no room in" in capsys.readouterr().out


# ---- contact
def test_a_piece_is_alone(tmp_path: Path) -> None:
    """In a process that ends: by itself, by an exception whose traceback is in the log, or by its limit."""
    log = tmp_path / "log"
    assert contact.alone(partial(time.sleep, 0), 600) == "ok"
    assert contact.alone(RAISES, 600, log) == "FAILED" and "ZeroDivisionError" in log.read_text()
    assert contact.alone(partial(time.sleep, 600), 0.2) == "timed out"
    assert contact.alone(partial(contact.probe, True, tmp_path / "device"), 600) == "ok"
    assert json.loads((tmp_path / "device").read_text())["device"] == "emulated"


@pytest.mark.parametrize("silent", [False, True], ids=["goes_on", "silent"])
def test_pieces_after_one_that_hangs(
    tmp_path: Path, answers: list[str], capsys: pytest.CaptureFixture[str], silent: bool
) -> None:
    answers += ["ok", "timed out", "FAILED" if silent else "ok", "FAILED"]
    out = tmp_path / "out"
    bad = contact.run_pieces(dict.fromkeys("abc", RAISES), RAISES, math.inf, out)
    ran = [(line["name"], line["status"]) for line in map(json.loads, out.read_text().splitlines())]
    silence = "last: the card does not answer after it"
    assert ran == [("a", "ok"), ("b", "timed out"), ("b", silence) if silent else ("c", "FAILED")]
    assert bad == (1 if silent else 2)
    assert "b: in the first case" in capsys.readouterr().out
    contact.run_pieces({"late": RAISES}, RAISES, time.monotonic(), out)
    assert capsys.readouterr().out.splitlines()[-1] == "no time left   0.0 s  late: "


def wrong_piece(card: Card) -> Iterator[Case]:
    x = torch.ones(3, 64)
    yield Case("off", lambda t: t * 1.5, lambda t: t, (x,))
    last_bit = cycle((0.0, torch.finfo(torch.float32).eps))  # as accurate as any rounding
    yield Case("other bits each time", lambda t: t * (1 + next(last_bit)), lambda t: t, (x,))
    yield Case("right", lambda t: t, lambda t: t, (x,))


def test_a_wrong_case_does_not_hide_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def here(*_: Any) -> Iterator[tuple[Card, str]]:
        yield Card("cpu", 2), ""

    monkeypatch.setitem(contact_pieces.PIECES, "wrong", Piece(wrong_piece, "sm80"))
    monkeypatch.setattr(contact, "card_and_arch", here)
    monkeypatch.setenv("SAIL_OPS_CUDA_KERNELS", "")
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match="wrong: wrong: off; other bits"):
        contact.run_piece("wrong", False, out)
    assert os.environ["SAIL_OPS_CUDA_KERNELS"] == "sm80"
    found = list(map(json.loads, out.read_text().splitlines()))
    assert [line["status"] for line in found] == ["FAILED", "FAILED", "ok"]
    assert "budget" in found[0]["error"] and found[1]["error"] == "results differ in their bits"
    said = contact.summary([*found, {"name": "wrong", "status": "FAILED", "seconds": 1}]).splitlines()
    assert said[0].startswith("  off: output 0: worst element") and said[-1] == "FAILED         1.0 s  wrong: emulated"


def test_kernels_by_name() -> None:
    symbol = "void sail::cuda::sm90::rows_kernel<__nv_bfloat16, (sail::cuda::Layout)0>(sail::cuda::RowsProblem)"
    assert contact.kernel_name(symbol) == "sm90::rows_kernel"
    assert contact.kernel_name("void sail::cuda::norm_kernel<float, 4>(A)") == "norm_kernel"
    assert contact.kernel_name("void at::native::elementwise_kernel<128>(int)") == ""
    both = ["norm_kernel", "sm80::attention_key_grad_kernel", "sm90::rows_kernel", "sm80::wgrad_kernel"]
    contact.check_arch(both, "")
    contact.check_arch(both[:3], "sm90")
    with pytest.raises(AssertionError, match="expected kernels of sm90, but these ran: sm80::wgrad_kernel"):
        contact.check_arch(both, "sm90")


@pytest.mark.parametrize("multiprocessors", [2, 78, 108, 114, 132, 144])
def test_every_product_has_a_second_tile_for_a_block(multiprocessors: int) -> None:
    """Tiles of 128 x 256 on Hopper, one block a multiprocessor; else 128 x 128, two, or three where rows are few."""
    case = contact_pieces.experts_case(Card("cpu", multiprocessors))
    R = case.T * case.K
    row_tiles = {
        "experts": max(R // 128, case.E),
        "groups": sum(math.ceil(rows / 128) for rows in contact_pieces.groups(R)),
    }
    for width, blocks in ((256, 1), (128, 2 if multiprocessors > 2 else 3)):
        products = [tiles * math.ceil(n / width) for tiles in row_tiles.values() for n in (2 * case.F, case.D)]
        gradients = [math.ceil(m / 128) * math.ceil(n / width) for m, n in ((2 * case.F, case.D), (case.D, case.F))]
        assert min(*products, *(case.E * tiles for tiles in gradients)) > blocks * multiprocessors


# ---- the command itself
def test_contact_and_headlines_on_the_emulator(tmp_path: Path) -> None:
    """At the sizes of two multiprocessors, and tiny ones."""
    command = [sys.executable, "tests/gpu/check.py", "--emulated", "--only", "^contact$", "--only", "^headlines$"]
    command += ["--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = result.stdout
    assert result.returncode == 0, said + result.stderr
    assert len(said) < 12_000 and said.splitlines()[-1] == "gpu-check: 2 of 2 stages without a failure"
    run_of, card, *found, verdict = lines(tmp_path)
    assert run_of["run"]["commit"] == check.commit() and card["device"] == "emulated" and verdict["partial"] is False
    contacts = [line for line in found if line["stage"] == "contact" and "name" in line]
    pieces = {line["name"]: line["status"] for line in contacts if "case" not in line}
    assert pieces == dict.fromkeys(contact_pieces.PIECES, "ok")
    assert all(f"s  {name}: emulated" in said for name in pieces)
    check_headlines([line for line in found if line["stage"] == "headlines" and "case" in line])
    assert re.search(r"against|3x\?", said), "the verdict by baseline"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.jsonl"]


def check_headlines(found: list[dict[str, Any]]) -> None:
    """Every case has its line of ours, and one of each peer with a speedup over it or why there is none."""
    cases = list(dict.fromkeys(line["case"] for line in found))
    kinds = ["experts"] * 2 + ["attention"] * 2 + ["decoder"] + ["grouped_mm"] * 3
    assert [case.split()[0] for case in cases] == kinds
    for case in cases:
        first, *peers = (line for line in found if line["case"] == case)
        assert first["implementation"] == "sail" and first["ms"]["sail"] > 0
        for line in peers:
            assert line.get("speedup", {}).keys() == ({line["implementation"]} if "ms" in line else set())
            assert "ms" in line or line["not_measured"]
    assert any(line["implementation"] == "stock_eager" and line.get("ms") for line in found)
