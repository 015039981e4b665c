"""README's table of NVIDIA cards: a row a card, a headline a family, "not measured" where there are no results."""

from typing import Any, NamedTuple

from benchmarks.tables import PEERS, Row, infos, table

NAMED = ("A100", "H100", "H20")  # have a row whether or not one was ever at hand
NOT_MEASURED = "not measured"


class Headline(NamedTuple):
    """One row of a family's results, and its peers by name and label."""

    title: str
    family: str
    case: dict[str, Any]
    peers: dict[str, str]


BF16 = {"dtype": "bf16"}
HEADLINES = (
    Headline(
        "expert layer, T 32768",
        "moe",
        BF16 | {"size": "full", "routing": "uniform", "mode": "train", "T": 32768},
        {name: PEERS[name] for name in ("grouped_mm", "liger")},
    ),
    Headline(
        "attention, causal, 4 x 4096",
        "attention",
        BF16 | {"name": "S4096-train"},
        {"sdpa_flash": "flash", "sdpa_cudnn": "cuDNN"},
    ),
    Headline(
        "decoder layer, T 32768", "step", BF16 | {"T": 32768}, {"transformers": "transformers", "liger": "with Liger"}
    ),
    Headline("loss, V 151936", "loss", BF16, {"cross_entropy": "full logits", "liger": "Liger"}),
    Headline("RMSNorm, D 4096", "norm", BF16 | {"op": "rms_norm", "D": 4096}, {"torch": "torch", "liger": "Liger"}),
)
LEGEND = """\
bf16, forward and backward: ours in ms, then the peers' times over it. flash, cuDNN: torch's SDPA by that backend."""


def card_table(devices: dict[str, dict[str, Row]]) -> str:
    """`devices`: the results of a folder cuda-* of benchmarks/results, by family. Cards that are named come first."""
    lines = []
    for card in NAMED:
        folders = [name for name in devices if card.lower() in name.split("-")]
        lines += [line(devices[name], name) for name in folders] or [line({}, card)]
    others = [name for name in devices if not any(card.lower() in name.split("-") for card in NAMED)]
    lines += [line(devices[name], name) for name in others]
    return table(["card", *(headline.title for headline in HEADLINES), "taken at"], lines)


def line(families: dict[str, Row], name: str) -> list[str]:
    """A card's row; what it calls itself stands for its folder's name."""
    runs = list(families.values())
    card = runs[0]["machine_info"]["card"]["name"] if runs else name
    commits = {f"{run['commit_info'].get('id', 'unknown')[:10]}, {run['datetime'][:10]}": None for run in runs}
    return [card, *(figures(families, headline) for headline in HEADLINES), "; ".join(commits) or NOT_MEASURED]


def figures(families: dict[str, Row], headline: Headline) -> str:
    """Our time and each peer's over it."""
    rows = infos(families[headline.family], headline.family) if headline.family in families else []
    rows = [i for i in rows if all(i["case"].get(key) == value for key, value in headline.case.items())]
    if not rows:
        return NOT_MEASURED
    (row,) = rows
    shown = [
        f"{row['speedup'][name]:.2f}x {label}" if name in row["speedup"] else f"{label} {NOT_MEASURED}"
        for name, label in headline.peers.items()
    ]
    return f"{row['ms']['sail']:.2f} ms; {', '.join(shown)}"
