"""`python -m training.demo`: train a small SAIL-VL2-MoE on easy-vqa, test it on held-out pictures, let it answer."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sail_model import SailVL2ForConditionalGeneration, SailVL2Processor
from training import checkpoint, cli, results
from training.assemble import Parts, assemble, chat, encode, load_records
from training.device import is_first
from training.evaluate import Accuracy, exact_match, majority_baseline, question_only_baseline
from training.plots import plot_curves
from training.recipes import Recipe
from training.records import PictureReader, Record
from training.run import train
from training.trainer import METRICS

DESCRIPTION = """Train a small SAIL-VL2-MoE on easy-vqa through DeepSpeed (ZeRO-2, optimizer in CPU memory), measure
exact match on its test split beside baselines, plot the loss, and answer one held-out question with
generate(). About five and a half minutes on two cores. Everything lands in the run's folder."""
CURVES = "curves.png"
ANSWER_KINDS = {
    "yes or no": {"yes", "no"},
    "a color": {"red", "green", "blue", "yellow", "teal", "brown", "gray", "black"},
    "a shape": {"circle", "rectangle", "triangle"},
}


def main(arguments: Sequence[str]) -> None:
    """Train, evaluate, plot, answer."""
    began = time.perf_counter()
    recipe, out, start = cli.read(cli.parser("training.demo", DESCRIPTION, out="runs/demo"), arguments)
    train_records, test_records = (load_records(recipe.data, split) for split in ("train", "test"))
    parts = assemble(recipe, start)
    encode(test_records, parts.processor, recipe.stream_length)  # a question that does not fit is said before training
    first_step = 0 if start is None else checkpoint.read_state(start)["step"]
    last = train(recipe, parts, out, start)
    trained = time.perf_counter()
    measured = evaluate(recipe, parts, train_records, test_records)
    if not is_first():
        return
    seconds = {"training": trained - began, "evaluation": time.perf_counter() - trained}
    plot_curves(out / METRICS, out / CURVES)
    console = Console(highlight=False)
    console.print(results_table(measured))
    kept = results.write(out, results.figures(recipe, parts, first_step, seconds, measured))
    places = {"results": kept, "curves": out / CURVES, "model": out / checkpoint.MODEL, "checkpoint": last}
    console.print("\n".join(f"{name:<12}{place}" for name, place in places.items()), soft_wrap=True)
    console.print(f"\n{one_answer(out / checkpoint.MODEL, parts.reader, test_records)}", soft_wrap=True)
    console.print(f"\ntraining {seconds['training']:.0f} s, all {time.perf_counter() - began:.0f} s")


def evaluate(
    recipe: Recipe, parts: Parts, train_records: list[Record], test_records: list[Record]
) -> dict[str, Accuracy]:
    """Exact match on the held-out split, also by kind of answer, and what it takes to be better than not looking."""

    def measure(records: list[Record], blank: bool) -> Accuracy:
        width = recipe.stream_length
        samples = encode(records, parts.processor, width)
        return exact_match(parts.model, samples, parts.reader, capacity=width, pad_id=parts.pad_id, blank=blank)

    found = {"the trained model": measure(test_records, recipe.blank_pictures)}
    for kind, answers in ANSWER_KINDS.items():
        if asked := with_answer(test_records, answers):
            found[f"  of these, where the answer is {kind}"] = measure(asked, recipe.blank_pictures)
    found["the same model, pictures blanked at test"] = measure(test_records, True)
    found["most frequent answer to each question"] = question_only_baseline(train_records, test_records)
    found["most frequent answer"] = majority_baseline(train_records, test_records)
    return found


def with_answer(records: list[Record], answers: set[str]) -> list[Record]:
    """The questions whose right answer is one of `answers`."""
    kept = [Record(r.picture, tuple(pair for pair in r.questions if pair[1] in answers)) for r in records]
    return [record for record in kept if record.questions]


def results_table(found: dict[str, Accuracy]) -> Table:
    """Exact match of each row of `found`."""
    table = Table("held-out exact match (teacher-forced argmax of every answer token)", "right", "asked", "share")
    for name, accuracy in found.items():
        table.add_row(name, f"{accuracy.right:,}", f"{accuracy.asked:,}", f"{accuracy.share:.1%}")
    return table


def one_answer(folder: Path, reader: PictureReader, records: list[Record]) -> str:
    """The saved model's answer to the first question whose picture can be read, beside the right one."""
    for record in records:
        if reader.read(record.picture) is not None:
            question, wanted = record.questions[0]
            answer = answer_from_disk(folder, record.picture, question)
            return f"{record.picture}\n  {question}  ->  {answer}   (right answer: {wanted})"
    return "no held-out picture can be read: no question to answer"


def answer_from_disk(folder: Path, picture: Path, question: str) -> str:
    """What the saved model answers, loaded anew, by greedy `generate()`."""
    model = SailVL2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = SailVL2Processor.from_pretrained(folder)
    prompt = processor.apply_chat_template(chat(question), add_generation_prompt=True)
    inputs = processor(images=str(picture), text=prompt)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    cli.run(main)
