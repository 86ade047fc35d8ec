"""Analyses of whole trainings: the ablation sweep, and forgetting."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cersa_diffusion import CersaConfig, ConfigError, plan_memory
from cersa_diffusion.analysis.ablations import draw_ablations, run_ablations, summary_rows, uniform_rank, variants
from cersa_diffusion.analysis.forgetting import draw_forgetting, forgetting_rows, method_rows, rate_rows, read_run
from cersa_diffusion.classification import ClassifierSettings, ImageData, RunArguments, TextData, train_classifier

from ..classification.conftest import sentences, write_pictures, write_table
from ..conftest import raises

VALUES = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True}


def image_data(folders) -> ImageData:
    return ImageData(train_dir=str(folders[0]), validation_dir=str(folders[1]))


def test_the_tables_have_the_rows_of_the_paper(model_path):
    settings = ClassifierSettings(model_name_or_path=str(model_path("vit")))
    rows = variants(settings)
    titles = {table: [row.title for row in rows if row.table == table] for table in (2, 3, 4, 5, 6)}
    assert titles[2] == ["Q, V", "Q, K, V", "Q, K, V, P", "Q, K, V, P, UP, DN"] and titles[3] == ["top r1", "bottom r2"]
    assert len(titles[4]) == 8 and titles[5][1].startswith("uniform, r = ") and titles[6] == ["matrix", "array"]
    for row in rows:
        replace(settings, **row.changes)  # valid settings, all of them


@pytest.fixture(scope="module")
def sweep(model_path, picture_folders, tmp_path_factory):
    """(settings, data, arguments, rows) of a sweep over three of the tables."""
    settings = ClassifierSettings(model_name_or_path=str(model_path("vit")))
    arguments = RunArguments(output_dir=str(tmp_path_factory.mktemp("sweep")), **VALUES)
    data = image_data(picture_folders)
    return settings, data, arguments, run_ablations(settings, data, arguments, tables=(3, 5, 6))


def test_the_sweep_trains_what_the_tables_compare(sweep):
    rows = {(row["table"], row["variant"]): row for row in sweep[3]}
    assert len(rows) == 6
    assert rows[3, "top r1"]["trained"] == rows[3, "bottom r2"]["trained"]
    assert rows[3, "top r1"]["memory"] == rows[3, "bottom r2"]["memory"]
    assert rows[6, "array"]["trained"] < rows[6, "matrix"]["trained"]
    layer_wise, uniform = (row for (table, _), row in rows.items() if table == 5)
    assert 0.9 * layer_wise["memory"] < uniform["memory"] <= layer_wise["memory"]
    # The same setting in two tables is one run.
    assert layer_wise["seconds"] == rows[6, "matrix"]["seconds"]
    assert len(list((Path(sweep[2].output_dir) / "runs").iterdir())) == 5
    figure = draw_ablations(sweep[3])
    assert [panel.get_title("left") for panel in figure.axes] == ["Table 3", "Table 5", "Table 6"]


def test_a_sweep_goes_on_with_what_is_missing(sweep):
    settings, data, arguments, rows = sweep
    shutil.rmtree(next((Path(arguments.output_dir) / "runs").glob("*diagonal*")))
    again = run_ablations(settings, data, arguments, tables=(6,))
    first = {row["variant"]: row for row in rows if row["table"] == 6}
    assert [row["variant"] for row in again if row["seconds"] != first[row["variant"]]["seconds"]] == ["array"]
    assert all(row["score"] == first[row["variant"]]["score"] for row in again)
    other = RunArguments(output_dir=arguments.output_dir, **VALUES | {"learning_rate": 1e-3})
    with raises(ConfigError, "learning_rate"):
        run_ablations(settings, data, other)


def test_summary_is_mean_and_deviation_over_seeds():
    common = {"table": 6, "metric": "accuracy", "trained": 5, "memory": 7}
    rows = [common | {"variant": "matrix", "score": score} for score in (0.8, 0.9)] + [
        common | {"variant": "array", "score": 0.5}
    ]
    matrix, array = summary_rows(rows)
    assert matrix["mean"] == pytest.approx(0.85) and matrix["deviation"] == pytest.approx(math.sqrt(0.005))
    assert matrix["seeds"] == 2 and array["deviation"] is None


def test_uniform_rank_is_the_largest_that_costs_no_more(network):
    plan = plan_memory(network, CersaConfig(alpha=0.9), show_progress=False)
    shapes = [(layer.out_features, layer.in_features) for layer in plan.layers]

    def numbers(ranks):
        # Table 1, with the singular values that we keep beside the change of the core.
        return sum((m + n) * k + k + 4 * k * k + 1 for (m, n), k in zip(shapes, ranks, strict=True))

    rank, most = uniform_rank(plan), numbers([layer.kept_rank for layer in plan.layers])
    assert numbers([min(rank, *shape) for shape in shapes]) <= most < numbers([min(rank + 1, *shape) for shape in shapes])


def test_bad_sweeps_are_refused(model_path, picture_folders, tmp_path):
    settings = ClassifierSettings(model_name_or_path=str(model_path("vit")))
    with raises(ConfigError, "tables", "[7]", "2", "3", "4", "5", "6"):
        variants(settings, (2, 7))
    with raises(ConfigError, "seeds"):
        run_ablations(settings, image_data(picture_folders), RunArguments(output_dir=str(tmp_path), **VALUES), seeds=())


@pytest.fixture(scope="module")
def picture_runs(model_path, picture_folders, tmp_path_factory):
    """Runs of two methods on two data sets: name -> folder."""
    folder = tmp_path_factory.mktemp("runs")
    stripes = (
        write_pictures(folder / "train", 24, 5, ("a", "b", "c")),
        write_pictures(folder / "validation", 12, 6, ("a", "b", "c")),
    )
    runs = {}
    for name, folders in {"two": picture_folders, "three": stripes}.items():
        for method in ("cersa", "lora"):
            runs[name, method] = folder / f"{name}-{method}"
            settings = ClassifierSettings(
                model_name_or_path=str(model_path("vit")), method=method, rank=32 if method != "lora" else 3
            )
            data = ImageData(train_dir=str(folders[0]), validation_dir=str(folders[1]), random_flip=True)
            train_classifier(settings, data, RunArguments(output_dir=str(runs[name, method]), **VALUES))
    return runs


def test_every_run_is_judged_on_the_data_of_the_others(picture_runs):
    rows = forgetting_rows(list(picture_runs.values()))
    assert len(rows) == 4 and all(row["learned"] != row["tested"] for row in rows)
    # The accuracy before does not depend on who asks.
    assert len({(row["tested"], row["before"]) for row in rows}) == 2
    assert all(0 <= row[when] <= 1 for row in rows for when in ("before", "after"))
    rates = rate_rows(rows)
    assert [rate["forgetting_rate"] for rate in rates] == pytest.approx(
        [(row["before"] - row["after"]) / row["before"] for row in rows]
    )
    cersa, _ = method_rows(rates)
    own = [rate["forgetting_rate"] for rate in rates if rate["method"] == "cersa"]
    assert cersa["average_forgetting_rate"] == pytest.approx(sum(own) / 2) and cersa["runs"] == 2
    assert [panel.get_title()[:8] for panel in draw_forgetting(rows).axes] == ["learned:"] * 2


def test_a_model_that_learned_nothing_forgets_nothing(model_path, text_files, tmp_path):
    """A learning rate of nothing: features, and with them the probe, stay what they were. On sentences, of full fine-tuning."""
    other = write_table(tmp_path / "other.csv", ["text", "second", "label"], sentences(24, 7))
    for name, files in {"a": text_files, "b": (other, other)}.items():
        settings = ClassifierSettings(model_name_or_path=str(model_path("bert")), method="full")
        data = TextData(train_file=str(files[0]), validation_file=[str(files[1])])
        train_classifier(settings, data, RunArguments(output_dir=str(tmp_path / name), **VALUES | {"learning_rate": 1e-12}))
    rows = forgetting_rows([tmp_path / "a", tmp_path / "b"])
    assert [row["before"] for row in rows] == [row["after"] for row in rows]
    assert all(rate["forgetting_rate"] == 0 for rate in rate_rows(rows))


def test_runs_that_cannot_be_compared_are_refused(picture_runs, tmp_path, monkeypatch):
    with raises(ConfigError, str(tmp_path)):
        forgetting_rows([tmp_path])
    with raises(ConfigError, "two"):
        forgetting_rows([picture_runs["two", "cersa"], picture_runs["two", "lora"]])
    other = tmp_path / "other"
    shutil.copytree(picture_runs["three", "lora"], other)
    description = other / "result" / "cersa_classifier.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps(content | {"base_model": {"name_or_path": "another", "revision": None}}))
    with raises(ConfigError, "2"):
        forgetting_rows([picture_runs["two", "cersa"], other])
    assert read_run(other).base == ("another", None)


def test_results_of_runs_are_opened_adapted(picture_runs, model_path):
    """The result folder of a run stands for its adapted model: in pairs, the layers of the method have moved, and only those."""
    from cersa_diffusion.analysis.models import open_pair

    pairs = open_pair(model_path("vit"), picture_runs["two", "lora"] / "result")
    moved = {pair.name.rsplit(".", 1)[-1] for pair in pairs if not torch.allclose(pair.before(), pair.after(), atol=1e-7)}
    assert moved == {"q_proj", "k_proj", "v_proj"}
