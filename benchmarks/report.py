"""Tables, verdict and chart from the results that a benchmark run leaves in results/<device>/<family>.json.

python -m benchmarks.report            writes RESULTS.md, every table of every device, and README.md's blocks between
                                       bench:targets (six of those that were aimed at) and bench:cards markers
python -m benchmarks.report --check    exits with 1 where one of the two does not match the results
python -m benchmarks.report DEVICE     prints the tables of every family in results/DEVICE/, a card's say
"""

import argparse
import json
from pathlib import Path

from benchmarks import card_page, cards
from benchmarks.tables import (
    CARD_TABLES,
    GRADIENTS,
    PEERS,
    TABLES,
    Row,
    against_best,
    graph_table,
    infos,
    memory_table,
    not_measured_table,
    speed_table,
    table,
    variant_table,
)
from benchmarks.targets import HEADLINE_FAMILIES, headline_table, target_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README_DEVICE = "cpu-amd-epyc-avx512_bf16-2t"  # whose results README shows
TITLES = {
    "moe": "The expert layer",
    "attention": "Attention",
    "norm": "Norms, rotary embedding and activation",
    "linear": "Linear layers",
    "loss": "Head and loss",
    "step": "A whole decoder layer",
    "training": "A whole step of training",
}
MARKERS = "<!-- bench:{}:start -->", "<!-- bench:{}:end -->"
NOTICE = "<!-- written by `python -m benchmarks.report`; do not edit -->"
LEGEND = """\
ms, GFLOP/s and GB/s are ours, medians of interleaved rounds; "x" columns are a peer's time over ours.
grouped_mm: transformers' default. eager + unbind: transformers' eager loop with W.unbind(0) for W[e], our rewrite.
stock eager: transformers' eager loop as it is; in training each W[e] builds a zero gradient of W's full size.
weights GB/s: least traffic of weights and dW over our time. of limit: time at the dense mm rate or at the memory
bandwidth, whichever is longer, over our time. dW added in place: main_grads for ours, .grad for the others."""


def verdict(results: Row) -> str:
    """Does "3x faster training" hold? By baseline and by where dW goes, over both routings and sizes, in bf16."""
    lines = []
    for peer, label in PEERS.items():
        note = ", an artefact" if peer == "stock_eager" else ""
        for gradients, where in GRADIENTS.items():
            rows = infos(results, "moe", dtype="bf16", gradients=gradients)
            lines.append([f"{label}{note}", where, [i["speedup"][peer] for i in rows if peer in i["speedup"]]])
        lines.append([f"{label}{note}", "its fastest of these, ours added in place", against_best(results, peer)])
    shown = [[label, where, *claim(ratios)] for label, where, ratios in lines if ratios]
    return table(["bf16 training against", "dW", "ours is faster by", "3x?"], shown)


def claim(ratios: list[float]) -> tuple[str, str]:
    """The span of the ratios, and whether 3x holds for all, some or none of them."""
    low, high = min(ratios), max(ratios)
    span = f"{low:.2f}x" if low == high else f"{low:.2f}x to {high:.2f}x"
    return span, "yes" if low >= 3 else "no" if high < 3 else "in part"


def summary(results: Row) -> str:
    """What a benchmark run prints at its end."""
    speed = speed_table(infos(results, "moe"))
    parts = [provenance(results), speed, speed and LEGEND, variant_table(results), memory_table(results)]
    parts += [CARD_TABLES[family](results) for family in CARD_TABLES] + [graph_table(results)]
    parts += [verdict(results), not_measured_table(results)]
    return "\n\n".join(part for part in parts if part)


def provenance(results: Row) -> str:
    """Machine, versions, commit and limits of a run, in two sentences."""
    info, commit = results["machine_info"], results["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    cpu = info["cpu"].get("brand_raw", "unknown CPU")
    on_card = "card" in info
    device = f"{info['card']['name']}, CUDA {info['cuda']}" if on_card else f"{cpu}, {info['isa']}"
    text = (
        f"{device}, {info['threads']} threads{f' of {cpu}' if on_card else ''}; {versions}; "
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


def moe_block(results: Row, source: str) -> str:
    """The page's part on the expert layer."""
    chosen = infos(results, "moe", dtype="bf16", routing="uniform")
    others = [i for i in infos(results, "moe") if i not in chosen]
    return f"""Measured on {provenance(results)} All rows, with every sample: [{source}.json]({source}.json).

![Rates beside transformers' implementations]({source}.png)

{verdict(results)}

{speed_table(chosen)}

{LEGEND}

{memory_table(results)}

<details><summary>Zipf routing, fp32, options</summary>

{speed_table(others)}

{variant_table(results)}

</details>"""


def family_block(results: Row, source: str, family: str) -> str:
    """The page's part on any other family: its table and where it comes from."""
    return f"""{TABLES[family](results)}

Measured on {provenance(results)} Every sample: [{source}.json]({source}.json)."""


def cards_block() -> str:
    """README's part on every card that has results, and on those that wait for theirs."""
    devices = {
        folder.name: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in sorted(RESULTS.glob("cuda-*"))
    }
    return f"{cards.card_table(devices)}\n\n{cards.LEGEND}"


def kept(device: str) -> dict[str, Row]:
    """The results of a device, by family."""
    paths = sorted(path for path in (RESULTS / device).glob("*.json") if path.stem in ("moe", *CARD_TABLES))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def page() -> str:
    """RESULTS.md: of every CPU what was aimed at and every table, then of every card what its runs printed, and what
    was predicted of its kernels beside what they took."""
    devices = sorted(folder.name for folder in RESULTS.iterdir() if folder.is_dir())
    parts = [f"# Results\n\n{NOTICE}"]
    for device in (name for name in devices if not name.startswith("cuda-")):
        families = kept(device)
        parts.append(f"## {device}")
        if families.keys() & HEADLINE_FAMILIES:  # nothing was aimed at for the others
            parts += ["### Aimed at, and reached", target_table(families)]
        for family in ("moe", *TABLES):
            if family in families:
                source = f"results/{device}/{family}"
                block = moe_block(families[family], source) if family == "moe" else None
                parts += [f"### {TITLES[family]}", block or family_block(families[family], source, family)]
    measured_cards = [name for name in devices if name.startswith("cuda-")]
    for device in measured_cards:
        families = kept(device)
        parts += [f"## {device}", *(summary(results) for results in families.values())]
        parts += card_page.parts(RESULTS / device, families)
    parts += card_page.without_results(measured_cards)
    return "\n\n".join(parts) + "\n"


def blocks() -> dict[str, str]:
    """README's parts by marker; ValueError where the results of one are missing."""
    families = kept(README_DEVICE)
    for family in HEADLINE_FAMILIES:
        if family not in families:
            raise ValueError(f"benchmarks/results/{README_DEVICE}/{family}.json is missing: run `make bench` there")
    return {"targets": headline_table(families, README_DEVICE), "cards": cards_block()}


def updated(readme: str) -> str:
    """README with every block written anew from its results; ValueError where one of the two is missing."""
    for name, block in blocks().items():
        start, end = (marker.format(name) for marker in MARKERS)
        if readme.count(start) != 1 or readme.count(end) != 1:
            raise ValueError(f"README.md must have {start} and {end} once each")
        head, _, rest = readme.partition(start)
        readme = f"{head}{start}\n{NOTICE}\n{block}\n\n{end}{rest.partition(end)[2]}"
    return readme


def show(device: str) -> int:
    """Print what is kept of a device."""
    # a demo's results (training/results.py) lie here too, and are no benchmark
    paths = sorted(path for path in (RESULTS / device).glob("*.json") if not path.stem.startswith("demo"))
    parts = [f"# {path.stem}\n\n{summary(json.loads(path.read_text()))}\n" for path in paths]
    if device.startswith("cuda-") and (RESULTS / device).is_dir():
        parts += card_page.parts(RESULTS / device, kept(device))
    for part in parts:
        print(part)
    if not parts:
        print(f"no results of {device}; there are: {', '.join(sorted(p.name for p in RESULTS.iterdir()))}")
    return int(not parts)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the two pages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    parser.add_argument("device", nargs="?", help="a folder of benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device:
        return show(options.device)
    readme, tables = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
    try:
        wanted = {readme: updated(readme.read_text()), tables: page()}
    except ValueError as error:
        print(error)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"out of date: {names}" if stale else f"README.md and RESULTS.md match {RESULTS.relative_to(ROOT)}")
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path])
    moe = RESULTS / README_DEVICE / "moe.json"
    chart(json.loads(moe.read_text()), moe.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
