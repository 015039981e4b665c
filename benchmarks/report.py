"""Tables, verdict and chart from the results that a benchmark run leaves in results/<device>/<family>.json.

python -m benchmarks.report            writes the block between README.md's bench:moe markers, and the chart
python -m benchmarks.report --check    exits with 1 where README.md does not match the results
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README_DEVICE = "cpu-amd-epyc-avx512_bf16-2t"  # whose results README shows
START, END = "<!-- bench:moe:start -->", "<!-- bench:moe:end -->"
Row = dict[str, Any]
GRADIENTS = {"fresh": "fresh", "huge_pages": "fresh, 2 MiB pages", "in_place": "added in place"}
PEERS = {"grouped_mm": "grouped_mm", "eager_unbind": "eager + unbind", "stock_eager": "stock eager"}
VARIANTS = {
    "sail_overwrite": "accumulate=False",
    "sail_recompute": "recompute=True",
    "sail_fp32_grads": "main_grads in fp32",
}
LEGEND = """\
ms, GFLOP/s and GB/s are ours, medians of interleaved rounds; "x" columns are a peer's time over ours.
grouped_mm: transformers' default. eager + unbind: transformers' eager loop with W.unbind(0) for W[e], our rewrite.
stock eager: transformers' eager loop as it is; in training each W[e] builds a zero gradient of W's full size.
weights GB/s: least traffic of weights and dW over our time. of limit: time at the dense mm rate or at the memory
bandwidth, whichever is longer, over our time. dW added in place: main_grads for ours, .grad for the others."""


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
    """Bytes a token of one training step with dW in place, beside what the design allows."""
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
        [i["case"]["op"], i["case"]["dtype"], f"{i['ms']['sail']:.2f}", f"{i['speedup']['torch']:.2f}"]
        + [f"{i['gb_s']:.1f}", f"{i['of_copy']:.2f}"]
        for i in infos(results, "norm")
    ]
    return table(["forward+backward", "dtype", "ms", "x torch", "GB/s", "of copy"], lines)


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


def verdict(results: Row) -> str:
    """Does "3x faster training" hold? By baseline and by where dW goes, over both routings and sizes, in bf16."""
    lines = []
    for peer, label in PEERS.items():
        for gradients, where in GRADIENTS.items():
            rows = infos(results, "moe", dtype="bf16", gradients=gradients)
            ratios = [i["speedup"][peer] for i in rows if peer in i["speedup"]]
            if ratios:
                low, high = min(ratios), max(ratios)
                holds = "yes" if low >= 3 else "no" if high < 3 else "in part"
                span = f"{low:.2f}x" if low == high else f"{low:.2f}x to {high:.2f}x"
                note = ", an artefact" if peer == "stock_eager" else ""
                lines.append([f"{label}{note}", where, span, holds])
    return table(["bf16 training against", "dW", "ours is faster by", "3x?"], lines)


def summary(results: Row) -> str:
    """What a benchmark run prints at its end."""
    speed = speed_table(infos(results, "moe"))
    parts = [provenance(results), speed, speed and LEGEND, variant_table(results), memory_table(results)]
    return "\n\n".join(
        part for part in [*parts, norm_table(results), attention_table(results), verdict(results)] if part
    )


def provenance(results: Row) -> str:
    """Machine, versions, commit and limits of a run, in two sentences."""
    info, commit = results["machine_info"], results["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    text = (
        f"{info['cpu'].get('brand_raw', 'unknown CPU')}, {info['isa']}, {info['threads']} threads; {versions}; "
        f"commit {commit.get('id', 'unknown')[:10]}{' with changes' if commit.get('dirty') else ''}, "
        f"{results['datetime'][:10]}."
    )
    if info["size"] != "full":
        text += f" Size {info['size']!r}: these timings mean nothing."
    if limits := info["limits"]:
        rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in limits["dense_gflops"].items())
        text += f" Limits in the same run: dense mm {rates} GFLOP/s; "
        text += f"read {limits['read_gb_s']:.1f}, write {limits['write_gb_s']:.1f} GB/s."
    return text


def chart(results: Row, path: Path) -> Path:
    """Bars of bf16, uniform routing: bandwidth where weights dominate, GFLOP/s where arithmetic does; limits dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limits = results["machine_info"]["limits"]
    rows = infos(results, "moe", dtype="bf16", routing="uniform")
    small = [i for i in rows if i["kind"] == "forward" and i["case"]["T"] <= 16]
    large = [i for i in rows if i["case"]["T"] == 1024 or (i["kind"] == "train" and i["case"]["T"] != 256)]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1, 3), layout="constrained")
    panels = [
        (axes[0], small, "weights_gb_s", "weights read, GB/s", limits["read_gb_s"], "read bandwidth"),
        (axes[1], large, "gflops", "GFLOP/s", limits["dense_gflops"]["bf16"], "dense mm"),
    ]
    for axis, cases, key, unit, limit, limit_name in panels:
        names = ["sail", *(peer for peer in PEERS if any(peer in i["ms"] for i in cases))]
        for n, name in enumerate(names):
            shown = [(x, i) for x, i in enumerate(cases) if name in i["ms"]]
            heights = [i[key] * i["ms"]["sail"] / i["ms"][name] for _, i in shown]
            left = [x + (n - (len(names) - 1) / 2) * 0.8 / len(names) for x, _ in shown]
            bars = axis.bar(left, heights, 0.8 / len(names), label=PEERS.get(name, "sail_ops"), color=f"C{n}")
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.axhline(limit, color="black", linestyle="--", linewidth=1)
        axis.annotate(f"{limit_name} {limit:.0f}", (-0.45, limit), va="bottom", fontsize=8)
        axis.set_xticks(range(len(cases)), [_tick(i["case"]) for i in cases], fontsize=8)
        axis.set_ylabel(unit)
        axis.set_ylim(0, 1.15 * limit)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Expert layer of Qwen3-30B-A3B (D 2048, F 768, E 128, K 8), bf16, uniform routing", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _tick(case: Row) -> str:
    if case["mode"] == "forward":
        return f"forward\nT={case['T']}"
    return f"training T={case['T']}\ndW {GRADIENTS[case['gradients']]}".replace(", ", ",\n")


def readme_block(results: Row, device: str) -> str:
    """What stands between the markers."""
    chosen = infos(results, "moe", dtype="bf16", routing="uniform")
    others = [i for i in infos(results, "moe") if i not in chosen]
    source = f"benchmarks/results/{device}/moe"
    return f"""{START}
<!-- written by `python -m benchmarks.report`; do not edit -->
Measured on {provenance(results)} All rows, with every sample: [{source}.json]({source}.json).

![Rates beside transformers' implementations]({source}.png)

{verdict(results)}

{speed_table(chosen)}

{LEGEND}

{memory_table(results)}

<details><summary>Zipf routing, fp32, options</summary>

{speed_table(others)}

{variant_table(results)}

</details>

{END}"""


def main(arguments: list[str] | None = None) -> int:
    """Write or check README's block; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where README.md is out of date")
    check = parser.parse_args(arguments).check
    source, readme = RESULTS / README_DEVICE / "moe.json", ROOT / "README.md"
    if not source.exists():
        print(f"{source.relative_to(ROOT)} is missing: run `make bench` on that device")
        return 1
    results, text = json.loads(source.read_text()), readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        print(f"README.md must have {START} and {END} once each")
        return 1
    head, _, rest = text.partition(START)
    updated = head + readme_block(results, README_DEVICE) + rest.partition(END)[2]
    if check:
        print(f"README.md {'matches' if updated == text else 'does not match'} {source.relative_to(ROOT)}")
        return int(updated != text)
    readme.write_text(updated)
    chart(results, source.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
