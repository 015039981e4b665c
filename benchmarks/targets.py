"""What was aimed at before the first line was written, and what the kept results reach."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.tables import Row, against_best, infos, table

Results = Mapping[str, Row]  # by family


class Target(NamedTuple):
    """`reached(results)` is to be at least `wanted`, or at most where `most`. `headline`: this family's in README."""

    what: str
    wanted: float
    measure: str
    reached: Callable[[Results], float]
    most: bool = False
    headline: str = ""


def expert_row(results: Results, key: str, dtype: str = "bf16", routing: str = "uniform", **case: object) -> float:
    """One figure of the expert layer's row of that case."""
    return float(infos(results["moe"], "moe", dtype=dtype, routing=routing, **case)[0][key])


def fastest(results: Results, peer: str, T: int) -> float:
    """The peer's time with dW kept whichever way is its fastest, over ours with dW in place."""
    (ratio,) = against_best(results["moe"], peer, routing="uniform", T=T)
    return ratio


def in_place(results: Results, T: int) -> float:
    """grouped_mm's time over ours where both add into dW."""
    row = infos(results["moe"], "moe", dtype="bf16", routing="uniform", mode="train", T=T, gradients="in_place")[0]
    return float(row["speedup"]["grouped_mm"])


def zipf(results: Results) -> float:
    """The most that Zipf routing takes longer than uniform routing, over the rows in bf16."""
    ratios = []
    for i in infos(results["moe"], "moe", dtype="bf16", routing="zipf"):
        same = {key: i["case"][key] for key in ("T", "mode", "gradients")}
        (uniform,) = infos(results["moe"], "moe", dtype="bf16", routing="uniform", **same)
        ratios.append(i["ms"]["sail"] / uniform["ms"]["sail"])
    return max(ratios)


def memory(results: Results, key: str) -> float:
    """Bytes over what the design allows, the larger of bf16 and fp32."""
    rows = [i["extra_info"]["memory"]["sail"] for i in results["moe"]["benchmarks"] if "memory" in i["extra_info"]]
    return max(row[key] / row[f"{key}_formula"] for row in rows)


def attention(results: Results, *names: str) -> float:
    """Ours against the fastest of torch's ways, the least over those cases."""
    rows = [i for i in infos(results["attention"], "attention") if i["case"]["name"] in names]
    return min(min(value for name, value in i["speedup"].items() if name.startswith("sdpa")) for i in rows)


def loss(results: Results, key: str) -> float:
    """Of bf16, against F.cross_entropy on full logits in fp32, as transformers has it."""
    row = infos(results["loss"], "loss", dtype="bf16")[0]
    if key == "speedup":
        return float(row["speedup"]["cross_entropy"])
    return float(row["peak"]["sail"] / row["peak"]["cross_entropy"])


def norm(results: Results, dtype: str) -> float:
    """The least share of a copy's rate."""
    names = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
    return min(i["of_copy"] for i in infos(results["norm"], "norm", dtype=dtype) if i["case"]["op"] in names)


def step(results: Results, key: str) -> float:
    """A whole decoder layer beside transformers'."""
    row = infos(results["step"], "step")[0]
    if key == "speedup":
        return float(row["speedup"]["transformers"])
    return float(row["peak_bytes"]["sail"] / row["peak_bytes"]["transformers"])


def training(results: Results, peer: str) -> float:
    """A whole step of the demo's model: the peer's time over ours on the same content."""
    (row,) = (i for i in infos(results["training"], "training") if i["kind"] == "train")
    return float(row["speedup"][peer])


def train(T: int) -> dict[str, object]:
    return {"T": T, "mode": "train", "gradients": "in_place"}


TARGETS = [
    Target("forward, T = 1", 0.85, "of the read bandwidth", lambda r: expert_row(r, "of_read_bandwidth", T=1)),
    Target("forward, T = 16", 0.80, "of the read bandwidth", lambda r: expert_row(r, "of_read_bandwidth", T=16)),
    Target("forward, T = 1024", 0.85, "of dense mm", lambda r: expert_row(r, "of_dense_mm", T=1024), headline="moe"),
    Target("the same in fp32", 0.85, "of dense mm", lambda r: expert_row(r, "of_dense_mm", "fp32", T=1024)),
    Target("training, T = 128", 2.5, "x grouped_mm's fastest row", lambda r: fastest(r, "grouped_mm", 128)),
    Target(
        "training, T = 512", 2.0, "x grouped_mm's fastest row", lambda r: fastest(r, "grouped_mm", 512), headline="moe"
    ),
    Target("the same", 2.8, "x eager + unbind's fastest row", lambda r: fastest(r, "eager_unbind", 512)),
    Target("the same, dW in place", 0.65, "of dense mm", lambda r: expert_row(r, "of_dense_mm", **train(512))),
    Target("training, T = 128, both adding into dW", 3.0, "x grouped_mm", lambda r: in_place(r, 128), headline="moe"),
    Target("training, T = 512, both adding into dW", 3.0, "x grouped_mm", lambda r: in_place(r, 512)),
    Target("Zipf routing, slowest row", 1.2, "x uniform's time", zipf, most=True),
    Target("saved for backward", 1.0, "of the design's formula", lambda r: memory(r, "saved"), most=True),
    Target("transient memory", 1.0, "of the design's formula", lambda r: memory(r, "transient"), most=True),
    Target("attention, S = 1024", 1.6, "x SDPA", lambda r: attention(r, "S1024-forward", "S1024-train")),
    Target(
        "attention, S = 4096",
        1.6,
        "x SDPA",
        lambda r: attention(r, "S4096-forward", "S4096-train"),
        headline="attention",
    ),
    Target("attention, ragged pack", 1.6, "x SDPA's best", lambda r: attention(r, "ragged-forward", "ragged-train")),
    Target("norms, slowest in bf16", 0.8, "of a copy", lambda r: norm(r, "bf16")),
    Target("norms, slowest in fp32", 0.8, "of a copy", lambda r: norm(r, "fp32")),
    Target("head and loss", 1.3, "x F.cross_entropy in fp32", lambda r: loss(r, "speedup")),
    Target(
        "head and loss, peak memory", 0.1, "of F.cross_entropy's", lambda r: loss(r, "peak"), most=True, headline="loss"
    ),
    Target("whole decoder layer", 1.5, "x transformers", lambda r: step(r, "speedup"), headline="step"),
    Target("whole decoder layer, peak memory", 1.0, "of transformers'", lambda r: step(r, "peak"), most=True),
    Target("the demo's step, fp32", 1.5, "x stock, padded batches", lambda r: training(r, "stock padded")),
    Target("the demo's step, fp32", 1.3, "x stock, the same packs", lambda r: training(r, "stock packed")),
]


HEADLINE_FAMILIES = tuple(dict.fromkeys(target.headline for target in TARGETS if target.headline))
COLUMNS = ["bf16 unless named", "target", "reached", "met"]


def target_table(results: Results) -> str:
    """A line a target: what was wanted, and what the kept results reach."""
    return table(COLUMNS, [line(target, results) for target in TARGETS])


def headline_table(results: Results, device: str) -> str:
    """README's lines, each with its source."""
    source = f"benchmarks/results/{device}"
    lines = [[*line(t, results), f"[{t.headline}.json]({source}/{t.headline}.json)"] for t in TARGETS if t.headline]
    return table([*COLUMNS, f"source, of {device}"], lines)


def line(target: Target, results: Results) -> list[str]:
    """What was aimed at, the target, what is reached, whether that is met."""
    wanted = f"{'at most ' if target.most else ''}{target.wanted:g} {target.measure}"
    try:
        value = target.reached(results)
    except (LookupError, ValueError):  # no such row
        return [target.what, wanted, "not measured", ""]
    met = value <= target.wanted if target.most else value >= target.wanted
    return [target.what, wanted, f"{value:.2f}", "yes" if met else "no"]
