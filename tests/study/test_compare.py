"""A whole comparison on the smallest base: picked rates, figures, resuming, report."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cersa_diffusion import ConfigError
from cersa_diffusion.study.cells import Cell
from cersa_diffusion.study.definition import read_study
from cersa_diffusion.study.run import compare
from cersa_diffusion.study.worker import run_cell
from cersa_diffusion.training import TrainingCallback, TrainingStopped, train_dreambooth

from ..conftest import raises
from .conftest import STUDY

TABLES = ("table.md", "table.csv", "table.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of the finished comparison, filled by the first test that asks `compared` for it."""
    return tmp_path_factory.mktemp("finished") / "output"


@pytest.fixture
def compared(study_file, in_process, finished):
    """(study, folder of its finished comparison); the folder is not to be changed."""
    study = read_study(study_file())
    if not finished.exists():
        compare(study, finished, engine=in_process)
    return study, finished


def results(output: Path, row: str, part: str = "test", **where) -> list[dict]:
    pattern = f"cells/{where.get('subject', '*')}/{row}/**/{part}.json"
    return [json.loads(path.read_text()) for path in sorted(output.glob(pattern))]


def test_rates_are_picked_on_validation_prompts_and_the_table_holds_means_and_spreads(compared):
    _, output = compared
    tried = {r["made_with"]["learning_rate"]: r["measures"]["distance"] for r in results(output, "lora-r2", "validation")}
    assert set(tried) == {1e-2, 1e-3}
    best = min(tried, key=tried.get)
    table = json.loads((output / "table.json").read_text())
    assert table["learning_rates"]["lora-r2"]["rate"] == best
    scored = results(output, "lora-r2")
    assert [(r["made_with"]["learning_rate"], r["made_with"]["seed"]) for r in scored] == [(best, 0), (best, 1)] * 2
    with (output / "table.csv").open(newline="") as file:
        lines = {(line["row"], line["subject"]): line for line in csv.DictReader(file)}
    assert [row for row, subject in lines if subject == "all"] == ["base", "truncated-.9", "lora-r2", "cersa-.9"]
    for subject, pattern in (("all", "*"), ("my-cat", "my-cat")):
        values = [r["measures"]["clipscore"] for r in results(output, "lora-r2", subject=pattern)]
        line = lines["lora-r2", subject]
        assert float(line["clipscore"]) == pytest.approx(np.mean(values), abs=1e-5)
        assert float(line["clipscore_spread"]) == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    assert lines["base", "all"]["drift_latent"] == "" and lines["base", "my-cat"]["clipscore_spread"] == ""
    assert float(lines["truncated-.9", "all"]["drift_latent"]) > 0
    costs = (output / "costs.md").read_text()
    assert "peak of the steps" in costs and "peak of preparing" in costs and "peak" not in (output / "table.md").read_text()


def test_validation_and_test_share_neither_prompts_nor_noise(compared):
    _, output = compared
    folder = next(output.glob("cells/my-cat/lora-r2/*/seed-0/test")).parent
    validation, test = (json.loads((folder / part / "prompts.json").read_text()) for part in ("validation", "test"))
    assert not set(validation.values()) & set(test.values())
    assert not {name[-9:] for name in validation} & {name[-9:] for name in test}


def test_a_finished_comparison_does_nothing_and_a_killed_one_gives_the_same_table(compared, in_process, tmp_path):
    study, finished = compared
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    before = {name: (output / name).read_bytes() for name in (*TABLES, "costs.csv", "report.html")}

    def idle(tasks):
        raise AssertionError(f"nothing is missing, but {tasks} are run")

    compare(study, output, engine=idle)
    assert {name: (output / name).read_bytes() for name in before} == before

    # Killed: one cell before its training, one after it, one while it was scored; the others stay as they are.
    shutil.rmtree(output / Cell("my-cat", "cersa-.9", 1e-2, 0).folder(output))
    Cell("my-dog", "cersa-.9", 1e-2, 1).result_file(output, "test").unlink()
    Cell("my-cat", "base").result_file(output, "test").unlink()
    kept = Cell("my-dog", "cersa-.9", 1e-2, 0).folder(output) / "training.json"
    written = kept.stat().st_mtime_ns
    for name in TABLES:
        (output / name).unlink()
    compare(study, output, engine=in_process)
    assert {name: (output / name).read_bytes() for name in TABLES} == {name: before[name] for name in TABLES}
    assert kept.stat().st_mtime_ns == written


class StopAfterOneStep(TrainingCallback):
    def should_stop(self) -> bool:
        return True


def test_a_killed_training_goes_on_from_its_checkpoint(compared, tmp_path):
    study, finished = compared
    cell, subject = Cell("my-cat", "cersa-.9", 1e-2, 1), study.read_subjects()["my-cat"]
    shutil.copytree(Cell("my-cat", "base").folder(finished), Cell("my-cat", "base").folder(tmp_path))
    run = cell.folder(tmp_path) / "run"
    config = study.config(study.row(cell.row), subject, learning_rate=cell.rate, seed=cell.seed, output_dir=str(run))
    with pytest.raises(TrainingStopped):
        train_dreambooth(config, [StopAfterOneStep()])
    assert (run / "checkpoint-1").is_dir()
    run_cell(study, cell, "test", tmp_path)
    whole, resumed = (json.loads(cell.result_file(folder, "test").read_text()) for folder in (finished, tmp_path))
    assert resumed == whole
    assert json.loads((run / "result.json").read_text())["steps"] == 2 and not list(run.glob("checkpoint-*"))


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_the_report_needs_nothing_but_its_folder(compared):
    _, output = compared
    html = (output / "report.html").read_text()
    parser = Links()
    parser.feed(html)
    outside = [link for link in parser.found if not link.startswith("data:image/webp;base64,")]
    assert len(outside) == 4 and all((output / link).is_file() for link in outside)
    assert "http" not in html and "script" not in parser.tags and "@import" not in html and "link" not in parser.tags
    # Every row of every prompt is shown: 2 test prompts (one has a held-back picture) and 1 without the subject.
    assert parser.tags.count("img") == 2 * (2 * 4 + 1 + 4)
    for row in ("base", "truncated-.9", "lora-r2", "cersa-.9", "ViT features", "0.01"):
        assert row in html
    grid = Image.open(output / "pictures" / "my-cat-prompts-with-the-subject.png")
    assert grid.width > grid.height / 5 and len(grid.convert("RGB").getcolors(1 << 24)) > 100


def test_results_of_other_settings_are_refused_before_anything_is_done(compared, study_file, in_process, tmp_path):
    _, output = compared
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    changed = read_study(study_file("other.toml", sampling={"steps": 2, "pictures": 2}))
    with raises(ConfigError, "sampling.steps", "--output"):
        compare(changed, output, engine=in_process)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == files


def test_a_diverging_rate_is_not_picked_and_a_diverging_row_is_said(study_file, in_process, tmp_path):
    rows = {
        "full": {"method": "full", "learning_rates": [1e-4, 1e30]},
        "wild": {"method": "full", "learning_rates": [1e30]},
    }
    study = read_study(study_file("wild.toml", subjects=["my-cat"], seeds=1, rows=rows))
    table = compare(study, tmp_path / "out", engine=in_process)
    assert table.choices["full"].rate == 1e-4 and table.choices["full"].scores[1e30] is None
    assert [(line.row, line.cells, line.diverged) for line in table.of("all")] == [("base", 1, 0), ("full", 1, 0), ("wild", 0, 1)]
    assert "wild (1 diverged)" in str(table) and "none, diverged" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("matched", [{"lora_rank": 3}, {"budget": "1.14MB"}])
def test_matched_memory_trains_as_many_bytes(matched, study_file, in_process, tmp_path):
    rates = {"lora_learning_rates": [1e-3], "cersa_learning_rates": [1e-2]}
    path = study_file("matched.toml", subjects=["my-cat"], seeds=1, matched_memory=matched | rates)
    compare(read_study(path, rows=["matched"], steps=1), tmp_path / "out", engine=in_process)
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        used = {line["row"]: float(line["trained_bytes"]) for line in csv.DictReader(file) if line["trained_bytes"]}
    assert list(used) == ["lora-matched", "cersa-matched"]
    # The last component that no longer fits is the difference.
    assert 0.97 * used["lora-matched"] < used["cersa-matched"] <= used["lora-matched"] * 1.001
    if "budget" in matched:
        # A rank is a twentieth of it here.
        assert 0.94 * 1.14e6 < used["lora-matched"] <= 1.14e6


def test_models_that_do_not_load_are_an_error_and_nothing_is_written(materials, study_file, in_process, tmp_path):
    study = read_study(study_file("models.toml", scoring=STUDY["scoring"] | {"clip": "small-base"}))
    with raises(ConfigError, "CLIP", "small-base"):
        compare(study, tmp_path / "out", engine=in_process)
    assert not list(tmp_path.iterdir())
