"""Markdown tables of what a benchmark run measured; a row's extra_info holds what its bench_<family>.py recorded."""

from typing import Any

Row = dict[str, Any]
GRADIENTS = {"fresh": "fresh", "huge_pages": "fresh, 2 MiB pages", "in_place": "added in place"}
PEERS = {"grouped_mm": "grouped_mm", "eager_unbind": "eager + unbind", "stock_eager": "stock eager"}
VARIANTS = {
    "sail_overwrite": "accumulate=False",
    "sail_recompute": "recompute=True",
    "sail_fp32_grads": "main_grads in fp32",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded to be read in a terminal too; empty without rows."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def infos(results: Row, family: str, **wanted: str) -> list[Row]:
    """extra_info of a family's timed rows, in the order they ran, whose case has the `wanted` values."""
    rows = [row["extra_info"] for row in results["benchmarks"]]
    rows = [i for i in rows if i.get("family") == family and i["kind"] != "memory"]
    return [i for i in rows if all(i["case"][key] == value for key, value in wanted.items())]


def speed_table(rows: list[Row]) -> str:
    """A line a case: our time and rates, each peer's time over ours, fractions of the limits."""
    header = ["case", "T", "step", "ms", "GFLOP/s", "weights GB/s"]
    header += [f"x {label}" for label in PEERS.values()] + ["of dense mm", "of read", "of limit"]
    lines = []
    for i in rows:
        case = i["case"]
        step = "forward" if case["mode"] == "forward" else f"forward+backward, dW {GRADIENTS[case['gradients']]}"
        ours = [step, f"{i['ms']['sail']:.1f}", f"{i['gflops']:.0f}", f"{i['weights_gb_s']:.1f}"]
        peers = [f"{i['speedup'][peer]:.2f}" if peer in i["speedup"] else "" for peer in PEERS]
        limits = [f"{i[key]:.2f}" for key in ("of_dense_mm", "of_read_bandwidth", "of_limit")]
        lines.append([f"{case['dtype']} {case['routing']}", str(case["T"]), *ours, *peers, *limits])
    return table(header, lines)


def variant_table(results: Row) -> str:
    """Our own options, by their time over that of the default."""
    lines = [
        [
            f"{i['case']['dtype']} T={i['case']['T']}",
            VARIANTS[name],
            f"{i['ms'][name]:.1f}",
            f"{i['speedup'][name]:.2f}",
        ]
        for i in infos(results, "moe")
        for name in VARIANTS
        if name in i["speedup"]
    ]
    return table(["dW added in place", "option", "ms", "x default"], lines)


def memory_table(results: Row) -> str:
    """Bytes a token of one training step with dW in place, beside what the design allows a token.

    What does not grow with tokens, such as the threads' scratch, is in what was measured.
    """
    header = ["memory, bytes a token", "saved for backward", "allowed", "transient peak", "allowed"]
    lines = []
    for info in (row["extra_info"] for row in results["benchmarks"] if row["extra_info"].get("kind") == "memory"):
        for name, m in info["memory"].items():
            keys = ("saved", "saved_formula", "transient", "transient_formula")
            shown = [f"{m[key] / m['tokens']:,.0f}" if m[key] is not None else "" for key in keys]
            lines.append([f"{info['case']['dtype']} {name}", *shown])
    return table(header, lines)


def norm_table(results: Row) -> str:
    """A line an operator: forward and backward against torch, and against the bandwidth of a copy."""
    lines = [
        [i["case"]["op"], i["case"]["dtype"], f"{i['ms']['sail']:.2f}"]
        + [f"{i['speedup'][peer]:.2f}" if peer in i["speedup"] else "" for peer in ("torch", "compiled")]
        + [f"{i['gb_s']:.1f}", f"{i['of_copy']:.2f}"]
        for i in infos(results, "norm")
    ]
    return table(["forward+backward", "dtype", "ms", "x torch", "x compiled", "GB/s", "of copy"], lines)


def loss_table(results: Row) -> str:
    """A line a peer: forward and backward of head and loss, and the peak of memory beside inputs and gradients."""
    lines = [
        [i["case"]["dtype"], name, f"{i['ms'][name]:.0f}", f"{i['ms'][name] / i['ms']['sail']:.2f}"]
        + [f"{i['peak'][name] / 1e6:.0f}", f"{i['peak']['sail'] / i['peak'][name]:.1%}"]
        for i in infos(results, "loss")
        for name in i["ms"]
    ]
    return table(["linear + cross-entropy", "by", "ms", "x sail", "peak MB", "sail's share"], lines)


def step_table(results: Row) -> str:
    """A decoder layer's training step: every part alone, the whole, and the peak of memory it adds."""
    lines = []
    for i in infos(results, "step"):
        ms = {name.removeprefix("sail "): time for name, time in i["parts_ms"].items() if name.startswith("sail ")}
        for part, ours in ms.items():
            lines.append([f"{i['case']['dtype']} {part}", ours, i["parts_ms"][f"transformers {part}"]])
        lines.append([f"{i['case']['dtype']} whole layer", i["ms"]["sail"], i["ms"]["transformers"]])
    shown = [[part, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"] for part, ours, theirs in lines]
    for i in infos(results, "step"):
        peaks = [i["peak_bytes"][side] / 2**20 for side in ("sail", "transformers")]
        shown.append(
            [f"{i['case']['dtype']} peak memory, MiB", *(f"{p:,.0f}" for p in peaks), f"{peaks[1] / peaks[0]:.2f}"]
        )
    return table(["forward+backward of a layer", "ours, ms", "transformers, ms", "theirs / ours"], shown)


def attention_table(results: Row) -> str:
    """A line a case: forward, or forward and backward, against torch's SDPA."""
    peers = {"sdpa": "SDPA", "sdpa_by_sequence": "by sequence", "sdpa_padded": "padded", "sdpa_nested": "nested"}
    lines = [
        [i["case"]["name"], i["case"]["dtype"], f"{i['ms']['sail']:.2f}", f"{i['gflops']:.0f}"]
        + [f"{i['speedup'][peer]:.2f}" if peer in i["speedup"] else "" for peer in peers]
        + [f"{i['of_dense_mm']:.2f}"]
        for i in infos(results, "attention")
    ]
    header = ["attention", "dtype", "ms", "GFLOP/s", *(f"x {label}" for label in peers.values()), "of dense mm"]
    return table(header, lines)


TABLES = {"norm": norm_table, "attention": attention_table, "loss": loss_table, "step": step_table}  # beside moe's
