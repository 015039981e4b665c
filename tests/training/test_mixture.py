"""A mixture names sources, weights and limits; what it leaves out or gets wrong is said."""

import json
from collections import Counter
from pathlib import Path

import pytest

from training.data.easy_vqa import NAMES, EasyVqa
from training.data.mixture import open_data, usable
from training.errors import InputError
from training.evaluate import pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("small", 4), ("large", 16)):
        records = [{"messages": [{"role": "assistant", "content": f"{name} {n}"}]} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def mixture(folder: Path, text: str) -> str:
    (folder / "mixture.yaml").write_text(text)
    return str(folder / "mixture.yaml")


HUGE = "- {path: large.jsonl, weight: 1.0e+308}\n"
BOTH = "sources:\n- path: small.jsonl\n- path: large.jsonl\n"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (BOTH, (0.2, 0.8)),
        ("balance: 0\n" + BOTH, (0.5, 0.5)),
        ("balance: 0.5\n" + BOTH, (1 / 3, 2 / 3)),
        ("sources:\n- {path: small.jsonl, weight: 3e-3}\n- {path: large.jsonl, weight: 1e-3}\n", (0.75, 0.25)),
        ("sources:\n- {path: small.jsonl, weight: 3}\n- {path: large.jsonl}\n", (0.75, 0.25)),
        ("sources:\n- {path: small.jsonl}\n- {path: large.jsonl, limit: 4}\n", (0.5, 0.5)),
    ],
)
def test_weights(text: str, weights: tuple[float, ...], folder: Path) -> None:
    assert open_data(mixture(folder, text)).weights == pytest.approx(weights)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_mixture_may_be_json(mark: str, folder: Path) -> None:
    sources = [{"path": "small.jsonl", "weight": 3}, {"path": "large.jsonl", "weight": 1}]
    path = folder / "mixture.JSON"
    path.write_text(mark + json.dumps({"sources": sources}, indent="\t"), encoding="utf-8")  # YAML knows no tabs
    assert open_data(str(path)).weights == (0.75, 0.25)
    path.write_text('{"sources": [}')
    with pytest.raises(InputError, match=r"mixture.JSON: Expecting value"):
        open_data(str(path))
    path.write_text('{"messages": []}')
    with pytest.raises(InputError, match="no JSON list, nor a mixture's sources; where it has a record a line"):
        open_data(str(path))
    path.write_text(json.dumps([{"messages": [{"role": "assistant", "content": '"sources"'}]}]))
    assert len(open_data(str(path)).sources[0]) == 1


def test_a_source_of_weight_zero_is_left_out(folder: Path) -> None:
    found = open_data(mixture(folder, "sources:\n- {path: small.jsonl}\n- {path: large.jsonl, weight: 0}\n"))
    assert len(found.sources) == 1 and found.weights == (1.0,)


def test_a_limit_takes_records_from_everywhere_and_always_the_same(folder: Path) -> None:
    name = mixture(folder, "sources:\n- {path: large.jsonl, limit: 5}\n")
    first, again = ([record.where for record in usable(open_data(name))] for _ in range(2))
    assert first == again and len(set(first)) == 5
    assert first != [f"{folder / 'large.jsonl'}: line {n}" for n in range(1, 6)]


def test_bad_records_are_not_usable(folder: Path) -> None:
    with (folder / "small.jsonl").open("a") as file:
        file.write("{}\n")
    assert len(list(usable(open_data(str(folder / "small.jsonl"))))) == 4


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[", "mixture.yaml: "),
        ("- a", "want a mapping"),
        ("sources: []", "at least one source"),
        ("source: []", "got source, want only"),
        ("sources:\n- small.jsonl", "source 1: got 'small.jsonl', want a mapping"),
        ("sources:\n- {path: small.jsonl, wieght: 2}", "got wieght, want only"),
        ("sources:\n- {weight: 2}", "without a path"),
        ("sources:\n- {path: small.jsonl, weight: many}", "got 'many', want a number"),
        ("sources:\n- {path: small.jsonl, weight: -1}", "got -1, want a number"),
        ("sources:\n- {path: small.jsonl, weight: 0}", "weights of all sources are 0"),
        ("sources:\n- {path: small.jsonl, limit: 0}", "limit: got 0"),
        ("sources:\n- {path: small.jsonl, limit: true}", "limit: got True"),
        ("balance: x\n" + BOTH, "balance: got 'x'"),
        ("balance: 400\n" + BOTH, "mixture.yaml: balance: got 400, too large for these sources"),
        ("balance: 255.9\n" + BOTH + "- path: large.jsonl\n", "balance: got 255.9, too large"),  # the sum alone is
        ("balance: .inf\n" + BOTH, "balance: got inf"),
        ("sources:\n- {path: small.jsonl, weight: 1.0e+308}\n" + HUGE, r"weight: got 1e\+308 of inf in all"),
        ("sources:\n- {path: small.jsonl, weight: 1.0e-300}\n" + HUGE, r"weight: got 1e-300 of 1e\+308 in all"),
        ("sources:\n- {path: none.jsonl}", "is no file"),
    ],
)
def test_what_a_mixture_gets_wrong(text: str, wrong: str, folder: Path) -> None:
    with pytest.raises(InputError, match=wrong):
        open_data(mixture(folder, text))


def test_what_is_no_data() -> None:
    with pytest.raises(InputError, match="data: got 'nowhere', want easy_vqa"):
        open_data("nowhere")


def test_easy_vqa_has_the_published_sizes() -> None:
    train, test = EasyVqa("easy_vqa"), EasyVqa("easy_vqa:test")
    assert (len(train), len(test)) == (4000, 1000)
    counts = [sum(len(source.conversation(n).branches) for n in range(len(source))) for source in (train, test)]
    assert counts == [38575, 9673]
    assert train.fingerprint["sha256"] != test.fingerprint["sha256"]


def test_parts_of_easy_vqa_have_their_kind_of_answers_alone_and_balanced_has_yes_as_often_as_no() -> None:
    asked = {name: list(pairs(usable(open_data(name)))) for name in NAMES}
    assert {answer for _, answer in asked["easy_vqa:shapes"]} == {"circle", "rectangle", "triangle"}
    whole = [pair for pair in asked["easy_vqa"] if pair[1] not in ("yes", "no")]
    assert asked["easy_vqa:shapes-and-colors"] == whole
    count = Counter(asked["easy_vqa:balanced"])
    for question in {question for question, answer in count if answer in ("yes", "no")}:
        yes, no = count[question, "yes"], count[question, "no"]
        assert abs(yes - no) < 5 * (yes + no) ** 0.5, question  # five standard deviations of as many draws
