"""scripts/eval_clipscore.py as a user starts it: folders, pipelines with adapters, and whatever can be wrong with the input."""

import csv
import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from PIL import Image

from cersa_diffusion.metrics.prompts import OBJECT_PROMPTS

from ..conftest import REPOSITORY, run_script
from ..pipelines_small import pipeline

SCRIPT = "scripts/eval_clipscore.py"
SMALL = ("--seeds", "0", "1", "--steps", "2")


@pytest.fixture(scope="module")
def images(subject_path, subject, tmp_path_factory) -> Path:
    """Four bundled pictures and prompts.json beside them."""
    folder = tmp_path_factory.mktemp("images")
    for entry in subject["instance"][:4]:
        shutil.copy(subject_path / entry["file"], folder)
    prompts = {Path(entry["file"]).name: entry["prompt"] for entry in subject["instance"][:4]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pipeline("sd1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    pipe = pipeline("sd1")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return folder


@pytest.fixture
def run_here(monkeypatch):
    """Runs the script in this process, which spares its imports; returns what it said when it gave up, or None."""

    def run(*arguments: str | Path) -> str | None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        try:
            runpy.run_path(str(REPOSITORY / SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return str(stop.code)

    return run


def scores(folder: Path) -> dict:
    result = json.loads((folder / "scores.json").read_text())
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == [row["picture"] for row in result["pictures"]]
    for name, mean in result["means"].items():
        assert f"| {name} " in (folder / "table.md").read_text()
        if name in rows[0]:
            assert mean == pytest.approx(np.mean([float(row[name]) for row in rows]), abs=2e-5)
    return result


def test_a_folder_with_both_backends_and_references(images, subject_path, tmp_path):
    prompts = json.loads((images / "prompts.json").read_text())
    prompts[next(iter(prompts))] = "a 3d emoji of a sks cat " * 9
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    arguments = ["--images", images, "--prompts", tmp_path / "prompts.json", "--unique_token", "sks", "--backend", "both"]
    arguments += ["--references", subject_path / "held_back"]
    finished = run_script(SCRIPT, *arguments, "--output", tmp_path / "a")
    assert finished.returncode == 0, finished.stderr
    result = scores(tmp_path / "a")
    means = result["means"]
    assert set(means) == {"clipscore_torchmetrics", "clipscore_open_clip", "clip_i", "vit_features"}
    assert means["clipscore_torchmetrics"] == pytest.approx(means["clipscore_open_clip"], abs=1e-3)
    assert len(result["pictures"]) == 4 and not any("sks" in row["prompt"] for row in result["pictures"])
    warned = [line for line in finished.stderr.splitlines() if "warning:" in line]
    assert len(warned) == 1 and "1 of 4 prompts are longer than its context of 24 tokens" in warned[0]
    assert "| clip_i " in finished.stdout and "knows emoji and nothing else" in finished.stdout
    again = run_script(SCRIPT, *arguments, "--output", tmp_path / "b")
    assert again.stdout.replace(str(tmp_path / "b"), str(tmp_path / "a")) == finished.stdout
    for name in ("scores.json", "scores.csv", "table.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_pipeline_with_a_cersa_adapter_from_prompts_to_drift(small_base, adapter_file, images, run_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("a sks cat\na red sks cat\n")
    (tmp_path / "drift.json").write_text('["a dog"]')
    arguments = ["--pipeline", small_base, "--adapter", adapter_file("sd1"), "--prompts", tmp_path / "prompts.txt", *SMALL]
    arguments += ["--unique_token", "sks", "--references", images, "--drift_prompts", tmp_path / "drift.json", "--weight", "2.5"]
    finished = run_script(SCRIPT, *arguments, "--output", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    result = scores(tmp_path / "out")
    kinds = ("clip", "vit_features")
    expected = {"clipscore_torchmetrics", "clip_i", "vit_features", "drift_latent"}
    assert set(result["means"]) == expected | {f"{name}_{kind}" for name in ("diversity", "drift") for kind in kinds}
    assert result["means"]["drift_latent"] > 0 and 0 <= result["means"]["clipscore_torchmetrics"] <= 2.5
    assert [(row["prompt"], row["seed"]) for row in result["pictures"]] == [
        ("a cat", 0), ("a cat", 1), ("a red cat", 0), ("a red cat", 1)
    ]  # fmt: skip
    # The drawn pictures are there, are the adapter's, and can be scored as a folder to the same figures.
    drawn = [np.asarray(Image.open(tmp_path / "out" / name / "000-seed0.png")) for name in ("drift", "drift_base")]
    assert (drawn[0] != drawn[1]).any()
    pictures = tmp_path / "out" / "pictures"
    arguments = ["--images", pictures, "--prompts", pictures / "prompts.json", "--unique_token", "sks", "--weight", "2.5"]
    assert run_here(*arguments, "--output", tmp_path / "folder") is None
    means = scores(tmp_path / "folder")["means"]
    assert means == {name: pytest.approx(result["means"][name], abs=2e-5) for name in means}
    assert "clipscore_torchmetrics" in means


def test_a_lora_and_a_built_in_list(small_base, small_lora, run_here, tmp_path):
    arguments = ["--pipeline", small_base, "--adapter", small_lora, "--prompt_list", "object", "--subject", "sks cat"]
    arguments += ["--seeds", "3", "--steps", "1", "--unique_token", "sks"]
    assert run_here(*arguments, "--output", tmp_path) is None
    rows = scores(tmp_path)["pictures"]
    assert [row["prompt"] for row in rows] == [template.format(subject="cat") for template in OBJECT_PROMPTS]
    assert run_here("--pipeline", small_base, *arguments[4:], "--output", tmp_path / "plain") is None
    first, second = (np.asarray(Image.open(folder / "pictures" / "000-seed3.png")) for folder in (tmp_path, tmp_path / "plain"))
    assert (first != second).any()


FOLDER, PIPELINE = {"images": "IMAGES", "prompt": "a cat"}, {"pipeline": "BASE", "prompt": "a cat"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FOLDER | {"images": "EMPTY"}, "--images: no pictures in"),
        (FOLDER | {"images": "DAMAGED"}, "cannot use broken.png"),
        (FOLDER | {"prompt": None, "prompts": "NOTHING"}, "has no prompt for"),
        (FOLDER | {"references": "EMPTY"}, "--references: no pictures in"),
        (FOLDER | {"output": "FILE"}, "is a file, expected a folder"),
        (FOLDER | {"clip": "no-such/folder/clip"}, "CLIP no-such/folder/clip: cannot be loaded"),
        (FOLDER | {"prompt": " "}, "--prompt is empty"),
        (FOLDER | {"batch_size": "0"}, "--batch_size is 0, expected more than 0"),
        (PIPELINE | {"pipeline": "/no/such/base"}, "base /no/such/base: no such folder"),
        (PIPELINE | {"adapter": "FILE"}, "safetensors"),
        (PIPELINE | {"drift_prompts": "EMPTY/none.txt", "base": "BASE"}, "--drift_prompts: "),
        (PIPELINE | {"drift_prompts": "FILE"}, "name an --adapter, or the --base"),
        (PIPELINE | {"prompt": None, "prompt_list": "object"}, "--prompt_list and --subject belong together"),
        (FOLDER | {"adapter": "FILE"}, "belong to --pipeline"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(options, message, images, small_base, run_here, capsys, tmp_path):
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "damaged" / "good.png")
    (tmp_path / "damaged" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "nothing.json").write_text("{}")
    places = {"IMAGES": images, "BASE": small_base, "EMPTY": tmp_path / "empty", "DAMAGED": tmp_path / "damaged"}
    places |= {"NOTHING": tmp_path / "nothing.json", "FILE": tmp_path / "nothing.json"}
    options = {"output": tmp_path / "out"} | options
    arguments = []
    for name, value in options.items():
        if value is not None:
            head, _, rest = str(value).partition("/")
            value = places[head] / rest if head in places else value
            arguments += [f"--{name}", value]
    said = run_here(*arguments)
    # Mistakes in the options are argparse's to say, with exit code 2.
    said = capsys.readouterr().err.strip().splitlines()[-1] if said == "2" else said
    assert said is not None and message in said and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_draws_and_scores_on_the_gpu(small_base, tmp_path):
    finished = run_script(SCRIPT, "--pipeline", small_base, "--prompt", "a cat", *SMALL, "--output", tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert torch.cuda.is_available() and scores(tmp_path)["means"]["diversity_clip"] > 0
