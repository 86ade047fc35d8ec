#!/usr/bin/env python
"""The demo: CERSA, LoRA and full fine-tuning learn one subject from five pictures; writes a picture and a table of all three."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from cersa_diffusion import CersaConfig, ConfigError, inject_cersa
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.metrics.clip_models import TransformersClip
from cersa_diffusion.metrics.clipscore import clipscore_torchmetrics
from cersa_diffusion.metrics.similarity import clip_image_similarity, latent_distance
from cersa_diffusion.pictures import load_picture
from cersa_diffusion.pipelines.draw import generate, picture_grid
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.text import table
from cersa_diffusion.training import load_result
from cersa_diffusion.training.run.result import RESULT_FILE

REPOSITORY = Path(__file__).resolve().parents[1]
BASE, CLIP = REPOSITORY / "assets" / "emoji-base", REPOSITORY / "assets" / "emoji-clip"
SUBJECTS = REPOSITORY / "assets" / "subjects"
# The better of the rates that were tried (see docs/demo.md); the text encoder has a tenth of the rate.
LEARNING_RATES = {"cersa": 1e-3, "lora": 1e-3, "full": 3e-4}
TITLES = {"cersa": "CERSA", "lora": "LoRA", "full": "full\nfine-tuning"}
ALPHA, RANK = 0.95, 32
# CERSA has the ranks of the paper, which are not rounded.
RANK_MULTIPLE = 1
SEEDS = range(4)
# A file in the folder of every demo; only a folder with this file may be emptied.
MARKER = ".cersa-demo"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/demo"),
        help="folder for all files; an earlier demo in it is replaced, except with --redraw",
    )
    names = sorted(path.name for path in SUBJECTS.iterdir())
    parser.add_argument("--subject", choices=names, default="fluent-robot", help="subject to learn")
    parser.add_argument("--steps", type=int, default=300, help="number of training steps per method")
    parser.add_argument("--redraw", action="store_true", help="keep the trained runs, and only draw and score again")
    return parser.parse_args()


def clear_output(folder: Path) -> None:
    """Creates the folder of the demo, or removes an earlier demo from it.

    Raises:
        ConfigError: the path is a file, or a folder with files that the demo has not made; nothing is changed.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [path for path in folder.iterdir() if path.name != MARKER]
    if entries and not (folder / MARKER).is_file():
        raise ConfigError(
            f"--output: {folder} is not empty and was not made by this demo (it has no file {MARKER}): choose a new folder, or "
            "empty this folder yourself"
        )
    # The marker is not removed, so that a demo which was stopped while it removed files can be started again.
    (folder / MARKER).write_text("The demo made this folder and empties it when it is started again.\n")
    for path in entries:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def train(method: str, subject: dict, output: Path, steps: int) -> None:
    """Trains one method with the command line of a user; every picture has its caption in the folder of the subject."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        # By default accelerate gives a process on a CPU a single thread.
        "--num_cpu_threads_per_process", str(os.cpu_count()), "--mixed_precision", "no", "--dynamo_backend", "no",
        str(REPOSITORY / "scripts" / "train_dreambooth_cersa.py"),
        "--pretrained_model_name_or_path", str(BASE), "--method", method,
        "--instance_data_dir", str(SUBJECTS / subject["name"] / "instance"), "--instance_prompt", subject["instance_prompt"],
        "--with_prior_preservation", "--class_data_dir", str(output / "class_pictures"),
        "--class_prompt", subject["class_prompt"], "--num_class_images", "48", "--sample_batch_size", "16",
        "--resolution", "64", "--center_crop", "--cache_latents", "--train_batch_size", "4", "--max_train_steps", str(steps),
        "--learning_rate", str(LEARNING_RATES[method]), "--text_encoder_lr", str(LEARNING_RATES[method] / 10),
        "--lr_scheduler", "cosine", "--alpha", str(ALPHA), "--rank", str(RANK),
        "--output_dir", str(output / method),
    ]  # fmt: skip
    if method == "cersa":
        command += ["--rank_multiple", str(RANK_MULTIPLE)]
    subprocess.run(command, check=True)


def read_results(output: Path) -> dict[str, dict]:
    """Label -> result of the trained runs of a demo.

    Raises:
        ConfigError: the training of a method is missing or unfinished.
    """
    paths = {title: output / method / RESULT_FILE for method, title in TITLES.items()}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise ConfigError(f"--redraw needs trained runs, but there is no {', '.join(missing)}: leave --redraw out to train them")
    return {title: json.loads(path.read_text()) for title, path in paths.items()}


def truncated_base() -> StableDiffusionPipeline:
    """The base truncated to its principal subspaces and not trained, as at the start of CERSA."""
    pipeline = load_base(str(BASE))
    for name, targets in STABLE_DIFFUSION.trained.items():
        config = CersaConfig(alpha=ALPHA, rank_multiple=RANK_MULTIPLE, target_modules=targets)
        inject_cersa(getattr(pipeline, name), config, show_progress=False)
    return pipeline


def columns(subject: dict) -> list[tuple[str, str]]:
    """(title, prompt) of the columns of the picture: backgrounds, held-back expressions, and prompts without the subject."""
    prompts = subject["evaluation_prompts"][:3]
    prompts += [entry["prompt"] for entry in subject["held_back"]]
    prompts += subject["drift_prompts"][:2]
    return [(prompt.removeprefix("a "), prompt) for prompt in dict.fromkeys(prompts)]


@dataclass(frozen=True)
class Judge:
    """Draws the same prompts with the same seeds with every model, and scores them.

    Args:
        subject: prompts of the bundled subject.
        references: its held-back pictures in the size of the base.
        clip: the CLIP that scores.
        autoencoder: autoencoder of the base, for distances.
    """

    subject: dict
    references: list[Image.Image]
    clip: TransformersClip
    autoencoder: AutoencoderKL

    def draw(self, pipeline: StableDiffusionPipeline) -> dict[str, list[Image.Image]]:
        """Prompt -> pictures, one per seed."""
        shown = [prompt for _, prompt in columns(self.subject)]
        prompts = list(dict.fromkeys([*self.subject["evaluation_prompts"], *shown, *self.subject["drift_prompts"]]))
        return dict(zip(prompts, generate(pipeline, prompts, SEEDS), strict=True))

    def score(self, pictures: dict[str, list[Image.Image]], base: dict[str, list[Image.Image]]) -> dict[str, float]:
        """Scores of the pictures of a model; `base` holds the pictures of the untouched base, for the drift.

        CLIPScore removes the rare word from the prompts, because the scoring model does not know it.
        """
        scored = [
            (picture, prompt.replace(" sks ", " ")) for prompt in pictures if " sks " in prompt for picture in pictures[prompt]
        ]
        scores = clipscore_torchmetrics([picture for picture, _ in scored], [prompt for _, prompt in scored], self.clip)
        pairs = [
            (picture, reference)
            for entry, reference in zip(self.subject["held_back"], self.references, strict=True)
            for picture in pictures[entry["prompt"]]
        ]
        drift = [pair for prompt in self.subject["drift_prompts"] for pair in zip(pictures[prompt], base[prompt], strict=True)]
        return {
            "clipscore": sum(scores) / len(scores),
            "clip_i": sum(clip_image_similarity([a], [b], self.clip) for a, b in pairs) / len(pairs),
            "distance": latent_distance(*map(list, zip(*pairs, strict=True)), self.autoencoder),
            "drift": latent_distance(*map(list, zip(*drift, strict=True)), self.autoencoder),
        }

    def ceiling(self) -> tuple[dict[str, float], list[Image.Image]]:
        """The scores of the held-back pictures themselves, and their row of the picture."""
        prompts = [entry["prompt"].replace(" sks ", " ") for entry in self.subject["held_back"]]
        scores = clipscore_torchmetrics(self.references, prompts, self.clip)
        pictures = {entry["prompt"]: picture for entry, picture in zip(self.subject["held_back"], self.references, strict=True)}
        blank = Image.new("RGB", self.references[0].size, "white")
        row = [pictures.get(prompt, blank) for _, prompt in columns(self.subject)]
        return {"clipscore": sum(scores) / len(scores), "clip_i": 1.0, "distance": 0.0}, row


def results_table(scores: dict[str, dict], results: dict[str, dict]) -> str:
    """The table of the demo in Markdown."""
    rows = []
    for label, score in scores.items():
        cells = [label.replace("\n", " "), f"{score['clipscore']:.1f}", f"{score['clip_i']:.3f}", f"{score['distance']:.3f}"]
        cells.append(f"{score['drift']:.3f}" if "drift" in score else "-")
        result = results.get(label)
        if result:
            memory = result["weight_bytes"] + result["gradient_bytes"] + result["optimizer_bytes"]
            cells += [f"{result['trainable_parameters'] / 1e6:.2f} M", f"{memory / 2**20:.1f} MiB"]
            cells += [f"{result['seconds']:.0f}", f"{result['file_bytes'] / 2**20:.1f} MiB"]
        else:
            cells += ["-"] * 4
        rows.append(cells)
    header = ["", "CLIPScore", "CLIP-I", "distance", "drift", "trainable", "bytes while training", "seconds", "file"]
    return table(header, rows, markdown=True)


def compare(subject: dict, results: dict[str, dict]) -> tuple[dict[str, dict], dict[str, list[Image.Image]]]:
    """Opens every result in a new pipeline, draws and scores: label -> scores, and label -> row of the picture."""
    openers: dict[str, Callable[[], StableDiffusionPipeline]] = {"base": lambda: load_base(str(BASE))}
    openers["truncated\nbase"] = truncated_base
    for method, label in TITLES.items():
        openers[label] = lambda method=method, label=label: load_result(method, Path(results[label]["weights_path"]), str(BASE))
    folder = SUBJECTS / subject["name"]
    references = [load_picture(folder / entry["file"]).resize((64, 64), Image.Resampling.BOX) for entry in subject["held_back"]]
    judge = Judge(subject, references, TransformersClip(CLIP), load_base(str(BASE)).vae)
    scores, rows, base = {}, {}, None
    for label, opener in openers.items():
        print(f"drawing with {' '.join(label.split())} ...", flush=True)
        pipeline = opener()
        pipeline.set_progress_bar_config(disable=True)
        pictures = judge.draw(pipeline)
        base = base or pictures
        scores[label] = judge.score(pictures, base)
        rows[label] = [pictures[prompt][0] for _, prompt in columns(subject)]
    scores["held-back\npictures"], rows["held-back\npictures"] = judge.ceiling()
    return scores, rows


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    output = arguments.output
    subject = json.loads((SUBJECTS / arguments.subject / "subject.json").read_text())
    try:
        if not arguments.redraw:
            clear_output(output)
            for method in TITLES:
                train(method, subject, output, arguments.steps)
        results = read_results(output)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    scores, rows = compare(subject, results)
    picture_grid(rows, [title for title, _ in columns(subject)]).save(output / "side_by_side.png")
    text = results_table(scores, results)
    (output / "table.md").write_text(text + "\n")
    (output / "results.json").write_text(json.dumps({"scores": scores, "runs": results}, indent=2) + "\n")
    print(f"\n{text}\n\ntotal time: {time.perf_counter() - start:.0f} s")
    print(f"open {output / 'side_by_side.png'}; the table is in {output / 'table.md'}, and the adapters are beside it")


if __name__ == "__main__":
    main()
