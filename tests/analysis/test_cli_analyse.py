"""`cersa analyse ...` as a user starts it: files, tables, and errors in one line."""

import csv
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from cersa_diffusion.cli.command import main

from ..conftest import raises

PNG = b"\x89PNG"


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tuned(model_path, tmp_path) -> Path:
    model = AutoModel.from_pretrained(model_path("vit"), add_pooling_layer=False)
    model.layers[0].attention.q_proj.weight.data.mul_(1.5).add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_every_analysis_of_a_model_writes_csv_and_png(model_path, tmp_path, capsys):
    vit, bert = str(model_path("vit")), str(model_path("bert"))
    for name, options in {
        "ranks": [vit, "--alphas", ".9", ".8"],
        "compression": [vit, bert, "--target_modules", "QKV", "QV", "--alphas", ".8", ".9"],
        "memory": [bert, "--alphas", ".9", "--ranks", "4", "--dtype", "bfloat16"],
        "throughput": [
            bert,
            "--alphas",
            ".9",
            "--ranks",
            "4",
            "--batch",
            "2",
            "--steps",
            "1",
            "--rounds",
            "1",
            "--device",
            "cpu",
        ],
    }.items():
        main(["analyse", name, *options, "--output", str(tmp_path)])
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG), name
        assert str(tmp_path / f"{name}.csv") in capsys.readouterr().out
    assert len(rows_of(tmp_path / "ranks.csv")) == 12 * 2 and rows_of(tmp_path / "ranks.csv")[0]["kind"] == "Q"
    assert len({row["model"] for row in rows_of(tmp_path / "compression.csv")}) == 4
    assert list(rows_of(tmp_path / "memory.csv")[0])[:2] == ["Method", "Trainable Parameter (M)"]
    assert [row["method"] for row in rows_of(tmp_path / "throughput.csv")] == ["full", "LoRA r=4", "CERSA alpha=0.9"]


def test_every_analysis_of_a_pair_writes_csv_and_png(model_path, tuned, tmp_path, capsys):
    vit, output = str(model_path("vit")), str(tmp_path)
    main(["analyse", "similarity", vit, str(tuned), "--target_modules", "QKV", "--output", output])
    main(["analyse", "intruders", vit, str(tuned), "--target_modules", "q_proj", "k_proj", "--leading", "3", "--output", output])
    assert [row["kind"] for row in rows_of(tmp_path / "similarity.csv")] == ["Q", "K", "V"]
    layers = {row["layer"]: float(row["psi_output"]) for row in rows_of(tmp_path / "similarity-layers.csv")}
    assert [name for name, psi in layers.items() if psi < 1 - 1e-6] == ["layers.0.attention.q_proj"]
    assert {row["side"] for row in rows_of(tmp_path / "similarity-grids.csv")} == {"output", "input"}
    assert len(rows_of(tmp_path / "intruders.csv")) == 4 * 7
    for name in ("similarity-output", "similarity-input", "intruders"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def test_trainings_from_the_command_line(model_path, picture_folders, tmp_path, capsys):
    """A small sweep; its runs and those of other data are then judged for what they forgot."""
    training = ["--model_name_or_path", str(model_path("vit")), "--max_steps", "1", "--use_cpu", "--disable_tqdm", "1"]
    for name, folders in {"a": picture_folders, "b": picture_folders[::-1]}.items():
        data = ["--train_dir", str(folders[0]), "--validation_dir", str(folders[1])]
        options = ["--tables", "6", "--seeds", "1", "--output", str(tmp_path / name)]
        main(["analyse", "ablations", "pictures", *options, "--training", *training, *data])
        assert (tmp_path / name / "ablations.png").read_bytes().startswith(PNG)
        assert [row["variant"] for row in rows_of(tmp_path / name / "ablations.csv")] == ["matrix", "array"]
        assert rows_of(tmp_path / name / "ablations-runs.csv")[0]["seed"] == "1"
    runs = [str(tmp_path / name / "runs" / "alpha-0.9_rank_multiple-1" / "seed-1") for name in "ab"]
    main(["analyse", "forgetting", *runs, "--output", str(tmp_path), "--device", "cpu"])
    (row,) = rows_of(tmp_path / "forgetting.csv")
    assert row["method"] == "cersa" and row["runs"] == "2" and (tmp_path / "forgetting.png").is_file()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["ranks", "/no/such/model"], "/no/such/model"),
        (["ranks", "VIT", "--alphas", "2"], "alphas 2.0"),
        (["memory", "VIT", "--target_modules", "to_q"], "to_q"),
        (["similarity", "VIT", "BERT"], "12"),
        (["similarity", "VIT", "VIT", "--layers", "x"], "x 12"),
        (["intruders", "VIT", "VIT", "--leading", "0"], "leading 0"),
        (["forgetting", "VIT"], "VIT"),
    ],
)
def test_errors_are_one_line(options, names, model_path, tmp_path):
    folders = {"VIT": str(model_path("vit")), "BERT": str(model_path("bert"))}
    given = [folders.get(option, option) for option in options]
    with raises(SystemExit, *(folders.get(name, name) for name in names.split())) as stopped:
        main(["analyse", *given, "--output", str(tmp_path)])
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)


def test_without_matplotlib_nothing_is_begun(model_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with raises(SystemExit, "error", "matplotlib", "cersa-diffusion[plot]"):
        main(["analyse", "ranks", str(model_path("vit")), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(model_path, tmp_path):
    (tmp_path / "file").write_text("")
    with raises(SystemExit, "error", "output", str(tmp_path / "file" / "new")):
        main(["analyse", "ranks", str(model_path("vit")), "--output", str(tmp_path / "file" / "new")])
