"""docs/decisions: every entry has its three parts under an id of its own, and code names no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (ROOT / "docs" / "decisions").glob("*.md") if p.name != "README.md")
ENTRIES = [(p.stem, *entry.split("\n", 1)) for p in FILES for entry in re.split(r"^## ", p.read_text(), flags=re.M)[1:]]
FOLDERS = ("csrc", "sail_ops", "sail_model", "training", "benchmarks", "tests")
KINDS = (".py", ".h", ".cuh", ".cu", ".cpp", ".sh")
SOURCES = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in KINDS]
NAMED = re.compile(r"docs/decisions/([\w-]+)\.md|docs/decisions, ([\w-]+)")


def test_every_entry_is_decision_evidence_and_revisit_under_an_id_of_its_own() -> None:
    ids = [heading.split(":")[0] for _, heading, _ in ENTRIES]
    assert len(ENTRIES) > 90 and len(set(ids)) == len(ids)
    for family, heading, text in ENTRIES:
        assert re.fullmatch(rf"{family}-[a-z0-9-]+(: .+)?", heading), heading
        # an entry that was superseded may have nothing but its decision as evidence
        parts = re.findall(r"^\*\*(Decision|Evidence|Revisit when)\b", text, flags=re.M)
        assert parts in (["Decision", "Evidence", "Revisit when"], ["Decision", "Revisit when"]), (heading, parts)


def test_code_names_decisions_that_exist() -> None:
    families, ids = {p.stem for p in FILES}, {heading.split(":")[0] for _, heading, _ in ENTRIES}
    for path in SOURCES:
        for family, entry in NAMED.findall(path.read_text()):
            assert family in families or entry in ids, f"{path}: {family or entry}"
