#!/usr/bin/env python
"""The demo: one subject learned from five pictures by CERSA, LoRA and full fine-tuning; a picture and a table of all three."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from cersa_diffusion import CersaConfig, inject_cersa
from cersa_diffusion.comparison import generate, markdown_table, picture_grid
from cersa_diffusion.metrics.clip_models import load_clip
from cersa_diffusion.metrics.clipscore import clipscore_torchmetrics
from cersa_diffusion.metrics.similarity import clip_image_similarity
from cersa_diffusion.training.base import TARGET_MODULES, load_base
from cersa_diffusion.training.data import load_picture
from cersa_diffusion.training.methods import load_result

REPOSITORY = Path(__file__).resolve().parents[1]
BASE, CLIP = REPOSITORY / "assets" / "emoji-base", REPOSITORY / "assets" / "emoji-clip"
SUBJECT = REPOSITORY / "assets" / "subjects" / "fluent-cat"
# Of the rates tried (README names them) the better ones; the text encoder learns at a tenth.
LEARNING_RATES = {"cersa": 1e-3, "lora": 1e-3, "full": 3e-4}
TITLES = {"cersa": "CERSA", "lora": "LoRA", "full": "full\nfine-tuning"}
ALPHA, RANK = 0.95, 32
SEEDS = range(4)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for everything; emptied first")
    parser.add_argument("--steps", type=int, default=300, help="training steps per method")
    return parser.parse_args()


def train(method: str, subject: dict, output: Path, steps: int) -> dict:
    """Trains one method through the command line a user has; returns its result."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(REPOSITORY / "scripts" / "train_dreambooth_cersa.py"),
        "--pretrained_model_name_or_path", str(BASE), "--method", method,
        "--instance_data_dir", str(SUBJECT / "instance"), "--instance_prompt", subject["instance_prompt"],
        "--with_prior_preservation", "--class_data_dir", str(output / "class_pictures"),
        "--class_prompt", subject["class_prompt"], "--num_class_images", "48", "--sample_batch_size", "16",
        "--resolution", "64", "--center_crop", "--train_batch_size", "4", "--max_train_steps", str(steps),
        "--learning_rate", str(LEARNING_RATES[method]), "--text_encoder_lr", str(LEARNING_RATES[method] / 10),
        "--lr_scheduler", "cosine", "--alpha", str(ALPHA), "--rank", str(RANK),
        "--output_dir", str(output / method),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return json.loads((output / method / "result.json").read_text())


def truncated_base() -> StableDiffusionPipeline:
    """The base cut to its principal subspaces, not trained: what CERSA starts from."""
    pipeline = load_base(str(BASE))
    for name, targets in TARGET_MODULES.items():
        inject_cersa(getattr(pipeline, name), CersaConfig(alpha=ALPHA, target_modules=targets), show_progress=False)
    return pipeline


def columns(subject: dict) -> list[tuple[str, str]]:
    """(title, prompt) of the picture's columns: backgrounds, the held-back expressions, and prompts without the subject."""
    prompts = subject["evaluation_prompts"][:3]
    prompts += [entry["prompt"] for entry in subject["held_back"]]
    prompts += subject["drift_prompts"][:2]
    return [(prompt.removeprefix("a "), prompt) for prompt in prompts]


def judge(
    pipeline: StableDiffusionPipeline, subject: dict, references: list[Image.Image], clip
) -> tuple[dict, list[Image.Image]]:
    """Scores of a model, and its row of pictures.

    CLIPScore leaves the rare word out of the prompts: the scoring model never saw it.
    """
    shown = [prompt for _, prompt in columns(subject)]
    prompts = list(dict.fromkeys([*subject["evaluation_prompts"], *shown]))
    pictures = dict(zip(prompts, generate(pipeline, prompts, SEEDS), strict=True))
    of_subject = [prompt for prompt in prompts if " sks " in prompt]
    scored = [(picture, prompt.replace(" sks ", " ")) for prompt in of_subject for picture in pictures[prompt]]
    scores = clipscore_torchmetrics([picture for picture, _ in scored], [prompt for _, prompt in scored], clip)
    held_back = [
        clip_image_similarity(pictures[entry["prompt"]], [reference], clip)
        for entry, reference in zip(subject["held_back"], references, strict=True)
    ]
    row = [pictures[prompt][0] for prompt in shown]
    return {"clipscore": sum(scores) / len(scores), "similarity": sum(held_back) / len(held_back)}, row


def ceiling(subject: dict, references: list[Image.Image], clip) -> tuple[dict, list[Image.Image]]:
    """The scores that the held-back pictures themselves get, and what is left of the row: them, where they belong."""
    prompts = [entry["prompt"].replace(" sks ", " ") for entry in subject["held_back"]]
    scores = clipscore_torchmetrics(references, prompts, clip)
    by_prompt = {entry["prompt"]: reference for entry, reference in zip(subject["held_back"], references, strict=True)}
    blank = Image.new("RGB", (64, 64), "white")
    row = [by_prompt.get(prompt, blank) for _, prompt in columns(subject)]
    return {"clipscore": sum(scores) / len(scores), "similarity": 1.0}, row


def table(scores: dict[str, dict], results: dict[str, dict]) -> str:
    """The demo's table in Markdown."""
    rows = []
    for label, score in scores.items():
        cells = [label.replace("\n", " "), f"{score['clipscore']:.1f}", f"{score['similarity']:.3f}"]
        result = results.get(label)
        if result:
            memory = result["weight_bytes"] + result["gradient_bytes"] + result["optimizer_bytes"]
            cells += [f"{result['trainable_parameters'] / 1e6:.2f} M", f"{memory / 2**20:.1f} MiB"]
            cells += [f"{result['seconds']:.0f}", f"{result['file_bytes'] / 2**20:.1f} MiB"]
        else:
            cells += ["-"] * 4
        rows.append(cells)
    header = ["", "CLIPScore", "similarity", "trainable", "bytes while training", "seconds", "file"]
    return markdown_table(header, rows)


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    output = arguments.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    subject = json.loads((SUBJECT / "subject.json").read_text())
    references = [load_picture(SUBJECT / entry["file"]).resize((64, 64), Image.Resampling.BOX) for entry in subject["held_back"]]
    results = {TITLES[method]: train(method, subject, output, arguments.steps) for method in TITLES}

    openers: dict[str, Callable[[], StableDiffusionPipeline]] = {"base": lambda: load_base(str(BASE))}
    openers["truncated\nbase"] = truncated_base
    for method, label in TITLES.items():
        openers[label] = lambda method=method, label=label: load_result(method, Path(results[label]["weights_path"]), str(BASE))
    clip = load_clip(CLIP)
    scores, rows = {}, {}
    for label, opener in openers.items():
        print(f"drawing with {' '.join(label.split())} ...", flush=True)
        pipeline = opener()
        pipeline.set_progress_bar_config(disable=True)
        scores[label], rows[label] = judge(pipeline, subject, references, clip)
    scores["held-back\npictures"], rows["held-back\npictures"] = ceiling(subject, references, clip)

    picture_grid(rows, [title for title, _ in columns(subject)]).save(output / "side_by_side.png")
    text = table(scores, results)
    (output / "table.md").write_text(text + "\n")
    (output / "results.json").write_text(json.dumps({"scores": scores, "runs": results}, indent=2) + "\n")
    print(f"\n{text}\n\n{time.perf_counter() - start:.0f} s in all")
    print(f"look at {output / 'side_by_side.png'}; the table is in {output / 'table.md'}, the adapters are beside it")


if __name__ == "__main__":
    main()
