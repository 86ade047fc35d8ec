#!/usr/bin/env python
"""Checks that a change of the code changes no result: compares digests of losses and files from short runs of every method.

    git stash; python benchmarks/same_bits.py --write before.json; git stash pop
    python benchmarks/same_bits.py --compare before.json

Every run has a fixed seed, one thread and the embedded models. The runs are 20 steps of DreamBooth with every method, 20 steps of
classification with every method, and a comparison of three rows with its tables of scores and sizes. Digests are the same on one
machine with the same versions of the libraries; on another machine the libraries may round in another way.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

# This has to come before the import of torch. With several threads, the order of additions may change.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import subprocess

from accelerate.state import AcceleratorState

from cersa_diffusion.classification import ClassifierSettings, ImageData, RunArguments, train_classifier
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, train_dreambooth

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = REPOSITORY / "assets"
SUBJECT = ASSETS / "subjects" / "fluent-cat"
STEPS = 20
DREAMBOOTH = {
    "cersa": {"method": "cersa"},
    "cersa beta": {"method": "cersa", "alpha": 0.9, "beta": 0.7},
    "cersa array": {"method": "cersa", "core": "diagonal"},
    "cersa budget, bf16": {"method": "cersa", "memory_budget": "60MB", "mixed_precision": "bf16"},
    "cersa, prior preservation": {
        "method": "cersa",
        "with_prior_preservation": True,
        "num_class_images": 4,
        "class_prompt": "a cat",
    },
    "svfit": {"method": "svfit", "svfit_rank": 64},
    "svft": {"method": "svft", "off_diagonals": 2},
    "lora": {"method": "lora", "rank": 8},
    "lora, cached latents": {"method": "lora", "rank": 8, "cache_latents": True, "center_crop": True},
    "pissa": {"method": "pissa", "rank": 8},
    "dora": {"method": "dora", "rank": 8},
    "full": {"method": "full"},
}
CLASSIFICATION = {
    "cersa": {"alpha": 0.9},
    "svfit": {"svfit_rank": 12},
    "svft": {},
    "lora": {"rank": 4},
    "pissa": {"rank": 4},
    "dora": {"rank": 4},
    "full": {},
}
STUDY = f"""
base = "{ASSETS}/emoji-base"
subjects = ["{SUBJECT}"]
seeds = 1
[scoring]
clip = "{ASSETS}/emoji-clip"
vision = "{ASSETS}/emoji-vit"
[training]
max_train_steps = 5
train_batch_size = 2
resolution = 64
[sampling]
steps = 2
pictures = 1
[rows.truncated]
method = "truncated"
alpha = 0.9
[rows.cersa]
method = "cersa"
alpha = 0.9
learning_rates = [1e-3, 3e-3]
[rows.lora]
method = "lora"
rank = 4
learning_rates = [1e-3]
"""


class Losses(TrainingCallback):
    """Records the loss of every step."""

    def __init__(self):
        self.values: list[float] = []

    def on_step(self, progress) -> None:
        self.values.append(progress.loss)


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def files(folder: Path, *patterns: str) -> dict[str, str]:
    """Name -> digest of the files below a folder."""
    return {
        str(path.relative_to(folder)): digest(path.read_bytes())
        for pattern in patterns
        for path in sorted(folder.rglob(pattern))
        if "checkpoint-" not in str(path.relative_to(folder))
    }


def dreambooth(options: dict, folder: Path) -> dict:
    """Digests of a training: its losses and the files with its weights."""
    subject, losses = json.loads((SUBJECT / "subject.json").read_text()), Losses()
    if options.get("with_prior_preservation"):
        options = options | {"class_data_dir": str(folder / "classes")}
    # accelerate would keep the precision of the first run for the whole process.
    AcceleratorState._reset_state(reset_partial_state=True)
    config = DreamBoothConfig(
        pretrained_model_name_or_path=str(ASSETS / "emoji-base"),
        instance_data_dir=str(SUBJECT / "instance"),
        instance_prompt=subject["instance_prompt"],
        output_dir=str(folder / "run"),
        resolution=64,
        train_batch_size=2,
        max_train_steps=STEPS,
        learning_rate=1e-3,
        seed=0,
        **options,
    )
    train_dreambooth(config, [losses])
    return {"losses": digest(json.dumps(losses.values).encode())} | files(folder / "run", "*.safetensors")


def classification(method: str, options: dict, folder: Path) -> dict:
    """Digests of a training of a classifier: its loss and the files with its weights."""
    for subject in ("fluent-cat", "fluent-robot"):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / subject).symlink_to(ASSETS / "subjects" / subject / "instance")
    settings = ClassifierSettings(model_name_or_path=str(ASSETS / "emoji-vit"), method=method, **options)
    data = ImageData(train_dir=str(folder / "pictures"), validation_fraction=0.25)
    arguments = RunArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    report = train_classifier(settings, data, arguments)
    return {"loss": repr(report.loss), "score": repr(report.score)} | files(folder / "run", "*.safetensors")


def comparison(folder: Path) -> dict:
    """Digests of the tables of a comparison, without the tables of measured costs."""
    (folder / "study.toml").write_text(STUDY)
    subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "compare_methods.py", folder / "study.toml", "--output", folder / "output"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return files(folder / "output", "table.md", "table.csv", "table.json")


def results() -> dict[str, dict]:
    """Name of a run -> name of a result -> its digest."""
    digests = {"golden": files(REPOSITORY / "tests" / "golden", "*.json")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CERSA_CACHE"] = str(folder / "cache")
        for number, (title, options) in enumerate(DREAMBOOTH.items()):
            digests[f"dreambooth {title}"] = dreambooth(options, folder / f"dreambooth-{number}")
        for method, options in CLASSIFICATION.items():
            digests[f"classification {method}"] = classification(method, options, folder / f"classification-{method}")
        (folder / "study").mkdir()
        digests["comparison"] = comparison(folder / "study")
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file for the digests")
    parser.add_argument("--compare", type=Path, help="file with earlier digests")
    arguments = parser.parse_args()
    digests = results()
    for title, values in digests.items():
        print(title, json.dumps(values))
    if arguments.write:
        arguments.write.write_text(json.dumps(digests, indent=1))
    if arguments.compare:
        earlier = json.loads(arguments.compare.read_text())
        differing = [title for title in {**earlier, **digests} if earlier.get(title) != digests.get(title)]
        print(f"{len(digests)} runs: {'DIFFERENT: ' + ', '.join(differing) if differing else 'the same bits'}")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
