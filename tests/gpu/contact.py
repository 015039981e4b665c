"""The first contact of the CUDA library with a card: python tests/gpu/contact.py [--only PATTERN] [--out FILE.jsonl]

Each piece of contact_pieces.py, the simplest first, is a process of its own with 20 seconds: one that fails or hangs
does not end the others while the card still answers. A case is right by the accuracy rule (fp64 on the card), has the
same bits in five runs, and names the kernels that ran. --emulated: on the emulator of CUDA kernels, at its sizes.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contact_pieces import Card, Case

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
LIMIT = 20.0  # seconds of a piece, and of a probe
PATIENCE = 10  # times as long on the emulator, whose machine may be slow, and busy with other work
EMULATED_CARD = "8.0 2 166912"  # two multiprocessors: SAIL_EMULATED_CARD of tests/cuda_emulation/host/cuda_runtime.h
FOR_EACH_ARCH = ("::rows_kernel", "::wgrad_kernel", "::attention_forward_kernel")  # of sm_80 and of sm_90


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="pieces that this expression finds")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="a line a case and a piece")
    parser.add_argument("--emulated", action="store_true")
    options = parser.parse_args(arguments)
    from contact_pieces import PIECES

    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "contact.jsonl"
        wanted = {n: partial(run_piece, n, options.emulated, out) for n in chosen(list(PIECES), options.only)}
        return run_pieces(wanted, partial(probe, options.emulated), deadline, out, seconds(options.emulated))


def seconds(emulated: bool) -> float:
    """What a piece and a probe may take."""
    return LIMIT * PATIENCE if emulated else LIMIT


def chosen(names: list[str], patterns: list[str] | None) -> list[str]:
    """Those that one of the expressions finds, all without one; an expression that finds none is an error."""
    for pattern in patterns or ():
        if not any(re.search(pattern, name, re.I) for name in names):
            sys.exit(f"--only: got {pattern!r}, which none of these has: {', '.join(names)}")
    return [n for n in names if not patterns or any(re.search(p, n, re.I) for p in patterns)]


def run_pieces(
    pieces: dict[str, Callable[[], None]],
    probe_card: Callable[[], None],
    deadline: float,
    out: Path,
    limit: float = LIMIT,
) -> int:
    """How many were not ok. A card that is silent after a piece that was not ends the run."""
    bad = 0
    for name, piece in pieces.items():
        start = time.monotonic()
        status = alone(piece, min(limit, deadline - start)) if start < deadline else "no time left"
        bad += status != "ok"
        write(out, name=name, status=status, seconds=round(time.monotonic() - start, 2))
        if status in ("FAILED", "timed out") and alone(probe_card, limit) != "ok":
            write(out, name=name, status="last: the card does not answer after it")
            break
    print(summary([json.loads(line) for line in out.read_text().splitlines()]), flush=True)
    return bad


def summary(lines: list[dict[str, Any]]) -> str:
    """A line a piece with the kernels that ran; above it the cases that were wrong, and the last one before a hang."""
    text, cases = [], list[dict[str, Any]]()
    for line in lines:
        if "case" in line:
            cases.append(line)
            continue
        text += [f"  {c['case']}: {c['error'].splitlines()[0]}" for c in cases if c["status"] != "ok"]
        said = ", ".join(sorted({kernel for c in cases for kernel in c.get("kernels", ())}))
        if line["status"] == "timed out":
            said = f"after {cases[-1]['case']}" if cases else "in the first case"
        text.append(f"{line['status']:12} {line.get('seconds', 0):5.1f} s  {line['name']}: {said}")
        cases = []
    return "\n".join(text)


def alone(function: Callable[[], None], limit: float, log: Path | None = None) -> str:
    """ok, FAILED or timed out: a process that calls the function, forked from one that has torch and no CUDA yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    process = context.Process(target=_call, args=(function, log))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join(5)  # one that the driver holds does not go at once
        return "timed out"
    return "ok" if process.exitcode == 0 else "FAILED"


def _call(function: Callable[[], None], log: Path | None) -> None:
    """Its output into the log: the fork server's own goes where its starter's went."""
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
    function()


def probe(emulated: bool = False, out: Path | None = None) -> None:
    """Whether the card answers: memory, a small kernel, a synchronization. Writes what card it is."""
    import torch

    if emulated:
        return write(out, device="emulated", torch=torch.__version__)
    total = torch.ones(1 << 20, device="cuda").sum()
    torch.cuda.synchronize()
    assert total.item() == 1 << 20, f"the sum of {1 << 20} ones is {total.item()}"
    of = torch.cuda.get_device_properties(0)
    capability, memory = f"{of.major}.{of.minor}", round(of.total_memory / 2**30, 1)
    facts = {"capability": capability, "multiprocessors": of.multi_processor_count, "memory_gib": memory}
    write(out, device=of.name, **facts, torch=torch.__version__, cuda=torch.version.cuda)


def run_piece(name: str, emulated: bool, out: Path | None) -> None:
    """Every case of the piece; then raises if one of them was wrong."""
    from contact_pieces import PIECES

    piece = PIECES[name]
    os.environ["SAIL_OPS_CUDA_KERNELS"] = piece.kernels
    wrong = []
    with card_and_arch(emulated, piece.kernels) as (card, arch):
        for case in piece.cases(card):
            start = time.monotonic()
            line: dict[str, Any] = {"name": name, "case": case.name, "status": "ok"}
            try:
                line["kernels"] = judge(case, card, arch)
            except Exception as error:  # the next case may be well, and a card is there for minutes
                traceback.print_exc()
                wrong.append(case.name)
                line |= {"status": "FAILED", "error": (str(error) or repr(error))[:500]}
            write(out, **line, seconds=round(time.monotonic() - start, 2))
    assert not wrong, f"{name}: wrong: {'; '.join(wrong)}"


@contextmanager
def card_and_arch(emulated: bool, kernels: str) -> Iterator[tuple["Card", str]]:
    """What runs the operators inside the block; "sm80" or "sm90", which its kernels must be, "" where that is open."""
    import torch
    from contact_pieces import Card

    if emulated:
        os.environ["SAIL_EMULATED_CARD"] = EMULATED_CARD
        from emulated_library import emulated as on_emulator

        torch.set_num_threads(1)
        with on_emulator():
            yield Card("cpu", int(EMULATED_CARD.split()[1])), ""
        return
    of = torch.cuda.get_device_properties(0)
    hopper = (of.major, of.minor) == (9, 0)
    yield Card("cuda", of.multi_processor_count), ("sm80" if kernels == "sm80" else "sm90") if hopper else ""


def judge(case: "Case", card: "Card", arch: str) -> list[str]:
    """Holds a case to the accuracy rule, its bits to five runs and its kernels to the card; returns their names."""
    from sail_ops import testing

    testing.check_op(case.op, case.reference, *case.args, pool=case.pool, **case.kwargs)
    testing.check_repeatable(case.op, *case.args, times=5 if card.device == "cuda" else 2, **case.kwargs)
    if card.device != "cuda":
        return ["emulated"]
    kernels = kernels_of(lambda: testing.run(case.op, *case.args, **case.kwargs))
    check_arch(kernels, arch)
    return kernels


def check_arch(kernels: list[str], arch: str) -> None:
    """Those that exist for both kinds of card are the wanted ones: a slower kernel is right, and would go unnoticed."""
    others = [name for name in kernels if name.endswith(FOR_EACH_ARCH) and arch and not name.startswith(f"{arch}::")]
    assert not others, f"expected kernels of {arch}, but these ran: {', '.join(others)}"


def kernels_of(function: Callable[[], object]) -> list[str]:
    """Names of sail_ops' kernels that a call launched, without their parameters; none where the profiler sees none."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sorted({name for event in profile.key_averages() if (name := kernel_name(event.key))})


def kernel_name(symbol: str) -> str:
    """`sm90::rows_kernel` of `void sail::cuda::sm90::rows_kernel<...>(...)`, "" of what is no kernel of sail_ops."""
    match = re.search(r"\bsail::cuda::((?:\w+|\(anonymous namespace\))(?:::\w+)*)", symbol)
    return match[1] if match else ""


def write(out: Path | None, **line: Any) -> None:
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
