"""A base that trains in a fraction of a second, with pictures to learn."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from ..pipelines_small import SIZE, pipeline


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the whole process; these tests change it."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """Family of `pipelines_small` -> folder of its pipeline."""
    folders = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("bases") / family
            pipeline(family).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture
def small_settings(small_base, subject_path, tmp_path) -> dict:
    """Settings of a run of four steps on the smallest base."""
    return {
        "pretrained_model_name_or_path": str(small_base("sd1")),
        "instance_data_dir": str(subject_path / "instance"),
        "instance_prompt": "a sks cat",
        "output_dir": str(tmp_path / "run"),
        "resolution": SIZE,
        "train_batch_size": 2,
        "max_train_steps": 4,
    }
