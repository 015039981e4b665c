"""Markdown tables of what a benchmark run measured; a row's extra_info holds what its bench_<family>.py recorded."""

from typing import Any

Row = dict[str, Any]
GRADIENTS = {"fresh": "fresh", "huge_pages": "fresh, 2 MiB pages", "in_place": "added in place"}
PEERS = {
    "grouped_mm": "grouped_mm",
    "grouped_mm_compiled": "compiled",
    "liger": "Liger",
    "eager_unbind": "eager + unbind",
    "stock_eager": "stock eager",
}
ATTENTION_PEERS = {
    "sdpa": "SDPA",
    "sdpa_flash": "flash",
    "sdpa_cudnn": "cuDNN",
    "sdpa_efficient": "efficient",
    "sdpa_by_sequence": "by sequence",
    "sdpa_padded": "padded",
    "sdpa_nested": "nested",
    "compiled": "compiled eager",
    "torch_varlen": "torch varlen",
    "flash_attn": "flash-attn",
}
VARIANTS = {
    "sail_overwrite": "accumulate=False",
    "sail_recompute": "recompute=True",
    "sail_fp32_grads": "main_grads in fp32",
    "sail_cluster": "clusters",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded to be read in a terminal too; empty without rows."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def infos(results: Row, family: str, graph: bool = False, **wanted: object) -> list[Row]:
    """extra_info of a family's timed rows, in the order they ran, whose case has the `wanted` values: of steps that
    were launched, or of those that were replayed as a CUDA graph."""
    rows = [row["extra_info"] for row in results["benchmarks"]]
    rows = [i for i in rows if i.get("family") == family and i["kind"] != "memory"]
    rows = [i for i in rows if bool(i["case"].get("graph")) == graph]
    return [i for i in rows if all(i["case"][key] == value for key, value in wanted.items())]


def against_best(results: Row, peer: str, **case: object) -> list[float]:
    """A peer's time over ours with dW in place, whichever way of keeping dW is the peer's fastest; in bf16."""
    rows = [i for i in infos(results, "moe", dtype="bf16", mode="train", **case) if peer in i["ms"]]
    ratios = []
    for ours in (i for i in rows if i["case"]["gradients"] == "in_place"):
        same = [i for i in rows if all(i["case"][key] == ours["case"][key] for key in ("routing", "T"))]
        ratios.append(min(i["ms"][peer] for i in same) / ours["ms"]["sail"])
    return ratios


def speed_table(rows: list[Row]) -> str:
    """A line a case: our time and rates, each peer's time over ours, fractions of the limits."""
    shown = present(rows, PEERS)
    header = ["case", "T", "step", "ms", "GFLOP/s", "weights GB/s"]
    header += [f"x {label}" for label in shown.values()] + ["of dense mm", "of read", "of limit"]
    lines = []
    for i in rows:
        case = i["case"]
        step = "forward" if case["mode"] == "forward" else f"forward+backward, dW {GRADIENTS[case['gradients']]}"
        ours = [step, f"{i['ms']['sail']:.1f}", f"{i['gflops']:.0f}", f"{i['weights_gb_s']:.1f}"]
        limits = [f"{i[key]:.2f}" for key in ("of_dense_mm", "of_read_bandwidth", "of_limit")]
        lines.append([f"{case['dtype']} {case['routing']}", str(case["T"]), *ours, *ratios(i, shown), *limits])
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


def present(rows: list[Row], peers: dict[str, str]) -> dict[str, str]:
    """Those of `peers`, by name and label, that a row was measured with: a card has others than a CPU."""
    return {name: label for name, label in peers.items() if any(name in i["speedup"] for i in rows)}


def ratios(row: Row, peers: dict[str, str]) -> list[str]:
    """The peers' times over ours, empty where one was not measured."""
    return [f"{row['speedup'][peer]:.2f}" if peer in row["speedup"] else "" for peer in peers]


def norm_table(results: Row) -> str:
    """A line an operator: forward and backward against torch, and against the bandwidth of a copy."""
    rows = infos(results, "norm")
    peers = present(rows, {"torch": "torch", "transformers": "transformers", "compiled": "compiled", "liger": "Liger"})
    several = len({i["case"]["D"] for i in rows}) > 1
    lines = [
        [f"{i['case']['op']}, D {i['case']['D']}" if several else i["case"]["op"], i["case"]["dtype"]]
        + [f"{i['ms']['sail']:.2f}", *ratios(i, peers), f"{i['gb_s']:.1f}", f"{i['of_copy']:.2f}"]
        for i in rows
    ]
    header = ["forward+backward", "dtype", "ms", *(f"x {label}" for label in peers.values()), "GB/s", "of copy"]
    return table(header, lines)


def loss_table(results: Row) -> str:
    """A line a peer: forward and backward of head and loss, and the peak of memory beside inputs and gradients."""
    lines = [
        [i["case"]["dtype"], name, f"{i['ms'][name]:.0f}", f"{i['ms'][name] / i['ms']['sail']:.2f}"]
        + [f"{i['peak'][name] / 1e6:.0f}", f"{i['peak']['sail'] / i['peak'][name]:.1%}"]
        for i in infos(results, "loss")
        for name in i["ms"]
    ]
    return table(["linear + cross-entropy", "by", "ms", "x sail", "peak MB", "sail's share"], lines)


def linear_table(results: Row) -> str:
    """A line a case: ours against `F.linear`, and which of the two `sail_ops.linear` is here."""
    lines = [
        [i["case"]["dtype"], str(i["case"]["T"]), i["case"]["mode"], f"{i['ms']['sail']:.2f}", f"{i['gflops']:.0f}"]
        + [f"{i['speedup']['torch']:.2f}", i["taken"], f"{i['of_dense_mm_fp32']:.2f}", f"{i['of_read_bandwidth']:.2f}"]
        for i in infos(results, "linear")
    ]
    header = ["linear", "T", "step", "ms", "GFLOP/s", "x F.linear", "taken", "of dense mm in fp32", "of read"]
    return table(header, lines)


def step_table(results: Row) -> str:
    """A decoder layer's training step: every part alone, the whole, and the peak of memory it adds, a column a side."""
    rows = infos(results, "step")
    peers = present(rows, {"transformers": "transformers", "liger": "Liger"})
    lines = []
    for i in rows:
        name = i["case"]["dtype"] + (f" T={i['case']['T']}" if len(rows) > 1 else "")
        for part in (part.removeprefix("sail ") for part in i["parts_ms"] if part.startswith("sail ")):
            lines.append(
                sides(f"{name} {part}", {side: i["parts_ms"].get(f"{side} {part}") for side in ("sail", *peers)})
            )
        lines.append(sides(f"{name} whole layer", {side: i["ms"].get(side) for side in ("sail", *peers)}))
    for i in rows:
        name = i["case"]["dtype"] + (f" T={i['case']['T']}" if len(rows) > 1 else "")
        peaks = {side: i["peak_bytes"][side] / 2**20 if side in i["peak_bytes"] else None for side in ("sail", *peers)}
        lines.append(sides(f"{name} peak memory, MiB", peaks, ",.0f"))
    labels = list(peers.values())
    over = ["theirs / ours"] if len(labels) == 1 else [f"{label} / ours" for label in labels]
    return table(["forward+backward of a layer", "ours, ms", *(f"{label}, ms" for label in labels), *over], lines)


def sides(name: str, values: dict[str, float | None], form: str = ".1f") -> list[str]:
    """A line of ours and theirs, then theirs over ours; empty where there is none."""
    ours, *theirs = values.values()
    shown = ["" if value is None else format(value, form) for value in (ours, *theirs)]
    return [name, *shown, *("" if value is None or ours is None else f"{value / ours:.2f}" for value in theirs)]


def attention_table(results: Row) -> str:
    """A line a case: forward, or forward and backward, against torch's SDPA and what else a card has."""
    rows = infos(results, "attention")
    peers = present(rows, ATTENTION_PEERS)
    lines = [
        [i["case"]["name"], i["case"]["dtype"], f"{i['ms']['sail']:.2f}", f"{i['gflops']:.0f}"]
        + [*ratios(i, peers), f"{i['of_dense_mm']:.2f}"]
        for i in rows
    ]
    header = ["attention", "dtype", "ms", "GFLOP/s", *(f"x {label}" for label in peers.values()), "of dense mm"]
    return table(header, lines)


def grouped_mm_table(results: Row) -> str:
    """A line a product, against torch's own."""
    rows = infos(results, "grouped_mm")
    lines = [
        [f"{i['case']['mode']}, w {i['case']['layout']}", f"{i['ms']['sail']:.2f}", *ratios(i, {"torch": ""})]
        + [f"{i['gflops']:.0f}", f"{i['of_dense_mm']:.2f}"]
        for i in rows
    ]
    return table(["grouped_mm", "ms", "x F.grouped_mm", "GFLOP/s", "of dense mm"], lines)


def graph_table(results: Row) -> str:
    """A line a step that was replayed as a CUDA graph: launched, replayed, and its peers' replays over ours."""
    lines = []
    for family in dict.fromkeys(row["extra_info"]["family"] for row in results["benchmarks"]):
        launched = infos(results, family)
        for i in infos(results, family, graph=True):
            case = i["case"]
            keys = [key for key in ("name", "op", "mode", "routing", "T", "D") if key in case]
            eager = [j["ms"]["sail"] for j in launched if all(j["case"][key] == case[key] for key in keys)]
            peers = ", ".join(f"{ratio:.2f} {name}" for name, ratio in i["speedup"].items() if name != "copy")
            named = " ".join(f"{key} {case[key]}" if key in ("T", "D") else str(case[key]) for key in keys)
            shown = [f"{ms:.3f}" for ms in (*eager[:1], i["ms"]["sail"])]
            lines.append([f"{family} {named}", *[""] * (2 - len(shown)), *shown, peers])
    return table(["replayed as a CUDA graph", "launched, ms", "replayed, ms", "x peers' replays"], lines)


def not_measured_table(results: Row) -> str:
    """Peers that could not run, and why, a line for all the cases of which a peer said the same."""
    said: dict[tuple[str, str, str], int] = {}
    for i in (row["extra_info"] for row in results["benchmarks"]):
        for name, reason in i.get("not_measured", {}).items():
            said[i["family"], name, reason] = said.get((i["family"], name, reason), 0) + 1
    lines = [
        [family, name, str(cases), reason.replace("|", "/")[:120]] for (family, name, reason), cases in said.items()
    ]
    return table(["not measured", "peer", "cases", "why"], lines)


def training_table(results: Row) -> str:
    """A model's step beside stock's on the same content, a table a model; then the bytes of a step on the wire."""
    rows = infos(results, "training")
    parts = [part for i in rows if i["kind"] == "train" for part in (whole_step_table(i), stock_line(i))]
    parts += [wire_table(i) for i in rows if i["kind"] == "wire"]
    return "\n\n".join(parts)


def whole_step_table(row: Row) -> str:
    """A line a way to train: time, peak of memory, the loss, which is one and the same, and what went through."""
    tokens, ms, peaks, lines = row["work"]["sail"]["tokens"], row["ms"], row["peak_bytes"], []
    on_card = {"mfu": ("MFU", ".1%"), "update_ms": ("update, ms", ".0f")} if "mfu" in row else {}
    for name in ms:
        work = [f"{row['work'][name][key]:,.0f}" for key in ("rows", "positions", "tiles", "labels")]
        speed = [f"{ms[name]:.0f}", f"{1e3 * tokens / ms[name]:,.0f}", f"{ms[name] / ms['sail']:.2f}"]
        speed += [format(row[key][name], form) for key, (_, form) in on_card.items()]
        memory = [f"{peaks[name] / 2**20:,.0f}", f"{peaks[name] / peaks['sail']:.2f}"]
        lines.append([name, *speed, *memory, f"{row['loss'][name]:.5f}", *work])
    header = [f"a step of {row['case']['model']}", "ms", "tokens/s", "x sail's time"]
    header += [*(title for title, _ in on_card.values()), "peak MiB", "x sail's peak", "loss"]
    return table([*header, "rows", "positions", "pictures", "labels"], lines)


def stock_line(row: Row) -> str:
    """What the peer is."""
    stock = ", ".join(f"{way} {part}" for part, way in row["stock"].items())
    return (
        f"ZeRO-2 with offload by DeepSpeed {row['deepspeed']}, {row['case']['dtype']}, from the same weights. "
        f"stock: transformers' modules with their defaults ({stock or 'not measured'}). padded: an answer a row, with "
        "its picture. tokens: those of sail's packs."
    )


def wire_table(row: Row) -> str:
    """Bytes that a step puts on the wire, a line a setting: counted, and in units of psi, the weights' bytes."""
    psi, counts = row["psi"], list(next(iter(row["wire"].values())))
    header = ["bytes on the wire a step, both processes"]
    header += [f"{unit}, {count} micro-batch{'es' * (count != '1')}" for count in counts for unit in ("MB", "psi")]
    lines = [
        [name, *(shown for count in counts for shown in (f"{of[count] / 1e6:.1f}", f"{of[count] / psi:.2f}"))]
        for name, of in row["wire"].items()
    ]
    return table(header, lines)


TABLES = {  # beside moe's
    "norm": norm_table,
    "attention": attention_table,
    "linear": linear_table,
    "loss": loss_table,
    "step": step_table,
    "training": training_table,
}
CARD_TABLES = TABLES | {"grouped_mm": grouped_mm_table}  # there are rows of a card alone
