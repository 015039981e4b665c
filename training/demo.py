"""`python -m training.demo`: train a small SAIL-VL2-MoE on easy-vqa, test it on held-out pictures, let it answer."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from sail_model import CorruptImageError, SailVL2ForConditionalGeneration, SailVL2Processor
from sail_model.images import load_image
from training import checkpoint, cli, parallel, results
from training.assemble import Parts, assemble, open_samples
from training.data.conversation import BadRecord, Conversation, Picture
from training.data.encode import EncodedMixture
from training.data.mixture import open_data, usable
from training.data.sample import Sample
from training.errors import InputError
from training.evaluate import Accuracy, exact_match, majority_baseline, pairs, question_only_baseline
from training.plots import plot_curves
from training.recipes import Recipe
from training.run import train
from training.runlog import METRICS

DESCRIPTION = """Train a small SAIL-VL2-MoE on easy-vqa through DeepSpeed (ZeRO-2, optimizer in CPU memory), measure
exact match on its test split beside baselines, plot the loss, and answer one held-out question with
generate(). Some minutes on two cores. Everything lands in the run's folder."""
CURVES = "curves.png"
ANSWER_KINDS = {
    "yes or no": {"yes", "no"},
    "a color": {"red", "green", "blue", "yellow", "teal", "brown", "gray", "black"},
    "a shape": {"circle", "rectangle", "triangle"},
}


def main(arguments: Sequence[str]) -> None:
    """Train, evaluate, plot, answer."""
    began = time.perf_counter()
    command = cli.read(cli.parser("training.demo", DESCRIPTION, out="runs/demo", recipe="demo"), arguments)
    recipe, out = command.plan[-1], command.out
    if not recipe.test:
        raise InputError("training.demo: --test: got none, want data held out: the demo tests what it has trained")
    parallel.start_processes(command.device)
    parts = assemble(command.plan[0], command.start)
    data = open_samples(recipe, parts.processor, recipe.test)
    train_records, test_records = (list(usable(mixture)) for mixture in (open_data(recipe.data), data.mixture))
    encoded(test_records, data)  # a question that does not fit is said before training
    first_step = 0 if command.start is None else command.start.state["total"]
    last = train(command, parts)
    trained = time.perf_counter()
    measured = evaluate(recipe, parts, data, train_records, test_records)
    if not parallel.is_first():
        return
    seconds = {"training": trained - began, "evaluation": time.perf_counter() - trained}
    plot_curves(out / METRICS, out / CURVES)
    console = Console(highlight=False)
    console.print(results_table(measured))
    kept = results.write(out, results.figures(command.plan, parts, first_step, seconds, measured))
    places = {"results": kept, "curves": out / CURVES, "model": out / checkpoint.MODEL, "checkpoint": last}
    console.print("\n".join(f"{name:<12}{place}" for name, place in places.items()), soft_wrap=True)
    console.print(f"\n{one_answer(out / checkpoint.MODEL, test_records)}", soft_wrap=True)
    console.print(f"\ntraining {seconds['training']:.0f} s, all {time.perf_counter() - began:.0f} s")


def encoded(records: list[Conversation], data: EncodedMixture) -> list[Sample]:
    """The records as samples. Raises InputError where one of them does not fit a stream."""
    try:
        return [sample for record in records for sample in data.encoded(record)]
    except BadRecord as error:
        raise InputError(f"--test: {error}") from error


def evaluate(
    recipe: Recipe,
    parts: Parts,
    data: EncodedMixture,
    train_records: list[Conversation],
    test_records: list[Conversation],
) -> dict[str, Accuracy]:
    """Exact match on the held-out split, also by kind of answer, and what it takes to be better than not looking."""

    def measure(records: list[Conversation], blank: bool) -> Accuracy:
        samples = encoded(records, data)
        return exact_match(parts.model, data, samples, capacity=recipe.stream_length, pad_id=parts.pad_id, blank=blank)

    found = {"the trained model": measure(test_records, recipe.blank_pictures)}
    for kind, answers in ANSWER_KINDS.items():
        if asked := with_answer(test_records, answers):
            found[f"  of these, where the answer is {kind}"] = measure(asked, recipe.blank_pictures)
    train, test = list(pairs(train_records)), list(pairs(test_records))
    found["the same model, pictures blanked at test"] = measure(test_records, True)
    found["most frequent answer to each question"] = question_only_baseline(train, test)
    found["most frequent answer"] = majority_baseline(train, test)
    return found


def with_answer(records: list[Conversation], answers: set[str]) -> list[Conversation]:
    """The questions whose right answer is one of `answers`."""
    kept = []
    for record in records:
        alone = [replace(record, branches=(branch,)) for branch in record.branches]
        branches = tuple(one.branches[0] for one in alone if next(pairs([one]))[1] in answers)
        if branches:
            kept.append(replace(record, branches=branches))
    return kept


def results_table(found: dict[str, Accuracy]) -> Table:
    """Exact match of each row of `found`."""
    table = Table("held-out exact match (teacher-forced argmax of every answer token)", "right", "asked", "share")
    for name, accuracy in found.items():
        table.add_row(name, f"{accuracy.right:,}", f"{accuracy.asked:,}", f"{accuracy.share:.1%}")
    return table


def one_answer(folder: Path, records: list[Conversation]) -> str:
    """The saved model's answer to the first question whose picture can be read, beside the right one."""
    for record in records:
        (picture,) = (part for part in record.turns[0].parts if isinstance(part, Picture))
        try:
            image = load_image(picture.source)
        except (CorruptImageError, OSError):
            continue
        question, wanted = next(pairs([record]))
        answer = answer_from_disk(folder, image, question)
        return f"{record.where}\n  {question}  ->  {answer}   (right answer: {wanted})"
    return "no held-out picture can be read: no question to answer"


def answer_from_disk(folder: Path, picture: Image.Image, question: str) -> str:
    """What the saved model answers, loaded anew, by greedy `generate()`."""
    model = SailVL2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = SailVL2Processor.from_pretrained(folder)
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    cli.run(main)
