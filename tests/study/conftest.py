"""The smallest comparison: a pipeline that trains in seconds, two subjects of a few 16-pixel pictures, a study file."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from cersa_diffusion.study import worker

from ..pipelines_small import SIZE, pipeline


def write_subject(folder: Path, noun: str, held_back: int = 2) -> Path:
    """A subject of random pictures."""
    generator = np.random.default_rng(len(noun))
    for name in ("instance", "held_back"):
        (folder / name).mkdir(parents=True)
        for number in range(2 if name == "instance" else held_back):
            pixels = generator.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    colours = ("red", "blue", "green")
    entries = {
        "name": folder.name,
        "instance_prompt": f"a sks {noun}",
        "class_prompt": f"a {noun}",
        "held_back": [{"file": f"held_back/{i}.png", "prompt": f"a {colours[i]} sks {noun}"} for i in range(held_back)],
        "evaluation_prompts": [f"a {colour} sks {noun}" for colour in colours],
        "drift_prompts": ["a dog"],
    }
    (folder / "subject.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="session")
def materials(tmp_path_factory, clip_path) -> Path:
    """Folder with a base, two subjects, and links to the embedded scoring models."""
    root = tmp_path_factory.mktemp("study")
    pipeline("sd1").save_pretrained(root / "small-base")
    for name, noun in (("my-cat", "cat"), ("my-dog", "dog")):
        write_subject(root / name, noun)
    for name in ("emoji-clip", "emoji-vit"):
        (root / name).symlink_to(clip_path.parent / name)
    return root


STUDY = {
    "base": "small-base",
    "subjects": ["my-cat", "my-dog"],
    "seeds": 2,
    "training": {"max_train_steps": 2, "train_batch_size": 1, "resolution": SIZE, "checkpointing_steps": 1},
    "sampling": {"steps": 1, "pictures": 2},
    "scoring": {"clip": "emoji-clip", "vision": "emoji-vit"},
    "rows": {
        "truncated-.9": {"method": "truncated", "alpha": 0.9},
        "lora-r2": {"method": "lora", "rank": 2, "learning_rates": [1e-2, 1e-3]},
        "cersa-.9": {"method": "cersa", "alpha": 0.9, "learning_rates": [1e-2]},
    },
}


@pytest.fixture
def study_file(materials):
    """Writes a study file: the smallest study with these changes ("rows.x" goes into the table, None takes away)."""

    def write(name: str = "study.toml", **changes) -> Path:
        values = json.loads(json.dumps(STUDY)) | changes
        values = {key: value for key, value in values.items() if value is not None}
        path = materials / name
        path.write_text(tomli_w.dumps(values))
        return path

    return write


@pytest.fixture
def in_process(monkeypatch):
    """An engine that runs the real tasks in this process, which spares a dozen starts of Python with torch and all."""

    def engine(tasks):
        for task in tasks:
            assert task.command[:3] == (sys.executable, "-m", worker.__name__)
            monkeypatch.setattr(sys, "argv", ["worker", *task.command[3:]])
            monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
            worker.main()
            yield task

    return engine
