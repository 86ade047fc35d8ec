"""What the page lists: the folders it was started with, and nothing that leads out of them."""

import shutil

import pytest

from cersa_diffusion.errors import ConfigError
from gradio_app.library import Library

from ..conftest import raises


def test_bases_and_runs_of_the_folders_are_listed(models_dir, runs_dir):
    library = Library([models_dir], [runs_dir])
    assert list(library.bases()) == ["small"]
    runs = library.runs()
    assert {run.name: (run.method, run.base_name, run.has_strength) for run in runs.values()} == {
        "cat-cersa": ("cersa", "small", True),
        "cat-full": ("full", "small", False),
        "cat-lora": ("lora", "small", True),
    }
    assert runs["cat-cersa"].file_bytes == (runs_dir / "cat-cersa" / "pytorch_cersa_weights.safetensors").stat().st_size
    assert runs["cat-cersa"].training_bytes > runs["cat-cersa"].file_bytes


def test_a_run_knows_which_base_it_was_trained_on(models_dir, runs_dir, tmp_path):
    shutil.copytree(runs_dir / "cat-lora", tmp_path / "cat")
    settings = tmp_path / "cat" / "config.toml"
    settings.write_text('revision = "v2"\nvariant = "fp16"\n' + settings.read_text())
    found = [Library([models_dir], [folder]).runs() for folder in (tmp_path, runs_dir)]
    origins = [(run.revision, run.variant) for run in (found[0]["cat"], found[1]["cat-lora"])]
    assert origins == [("v2", "fp16"), (None, None)]


def test_runs_of_further_folders_carry_the_name_of_their_folder(models_dir, runs_dir, tmp_path):
    again = tmp_path / runs_dir.name
    shutil.copytree(runs_dir / "cat-lora", again / "cat-lora")
    names = list(Library([models_dir], [tmp_path / "none", runs_dir, again]).runs())
    assert names == ["trained: cat-cersa", "trained: cat-full", "trained: cat-lora", "trained 2: cat-lora"]


def test_a_folder_that_is_a_pipeline_and_a_given_base_are_bases(models_dir):
    assert list(Library([models_dir / "small"], []).bases()) == ["small"]
    assert list(Library([], [], [str(models_dir / "small"), "someone/a-model"]).bases()) == ["small", "someone/a-model"]


@pytest.mark.parametrize("name", ["../small", "/etc", "small/../small", "", "small\0"])
def test_names_are_looked_up_and_never_joined(models_dir, name):
    with raises(ConfigError, "base", repr(name)):
        Library([models_dir], []).base(name)


def test_links_out_pickles_and_foreign_bases_are_not_listed(models_dir, runs_dir, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "linked").symlink_to(runs_dir / "cat-cersa")
    shutil.copytree(runs_dir / "cat-full", runs / "pickled")
    (runs / "pickled" / "pipeline" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    shutil.copytree(runs_dir / "cat-lora", runs / "linked-weights")
    weights = runs / "linked-weights" / "pytorch_lora_weights.safetensors"
    weights.unlink()
    weights.symlink_to("/etc/hostname")
    shutil.copytree(runs_dir / "cat-cersa", runs / "damaged")
    (runs / "damaged" / "result.json").write_text("{")
    library = Library([models_dir], [runs])
    assert library.runs() == {}
    shutil.copytree(runs_dir / "cat-cersa", runs / "deeper" / "moved")
    assert list(library.runs()) == ["deeper/moved"]
    assert Library([], [runs]).runs() == {}


def test_a_model_of_pickles_is_no_base(models_dir, tmp_path):
    shutil.copytree(models_dir / "small", tmp_path / "pickled")
    (tmp_path / "pickled" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    assert Library([tmp_path], []).bases() == {}
