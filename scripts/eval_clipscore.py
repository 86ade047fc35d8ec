#!/usr/bin/env python
"""CLIPScore of a folder of pictures: 100 * max(cos(picture, prompt), 0), by torchmetrics, by open_clip, or by both."""

import argparse
import csv
import json
import sys
from pathlib import Path

from cersa_diffusion.errors import CersaError, ConfigError
from cersa_diffusion.metrics.clip_models import OpenClipModel, load_clip
from cersa_diffusion.metrics.clipscore import clipscore_open_clip, clipscore_torchmetrics
from cersa_diffusion.training.data import load_picture, picture_paths

EMBEDDED_CLIP = Path(__file__).resolve().parents[1] / "assets" / "emoji-clip"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one prompt for all pictures")
    prompts.add_argument("--prompts", type=Path, help="JSON object: file name -> prompt")
    parser.add_argument("--backend", choices=["torchmetrics", "open_clip", "both"], default="both")
    parser.add_argument(
        "--clip",
        default=str(EMBEDDED_CLIP),
        help="CLIP in transformers' format (folder or hub id), or ARCHITECTURE:PRETRAINED for --backend open_clip; default: "
        "the small CLIP of the emoji base, for photographs use openai/clip-vit-base-patch16 or ViT-B-16:openai",
    )
    parser.add_argument("--output", type=Path, help="folder for clipscore.csv and clipscore.json")
    return parser.parse_args()


def read_prompts(arguments: argparse.Namespace, names: list[str]) -> list[str]:
    """One prompt per picture, in the order of the names."""
    if arguments.prompt is not None:
        return [arguments.prompt] * len(names)
    try:
        prompts = json.loads(arguments.prompts.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts: {arguments.prompts} is not a readable JSON file ({error})") from error
    if not isinstance(prompts, dict):
        raise ConfigError(f"--prompts: {arguments.prompts} is not a JSON object of file name -> prompt")
    missing = [name for name in names if not isinstance(prompts.get(name), str)]
    if missing:
        raise ConfigError(f"--prompts: {arguments.prompts} has no prompt for {', '.join(missing[:5])}")
    return [prompts[name] for name in names]


def score(arguments: argparse.Namespace) -> dict:
    """Scores per backend and picture, and their means."""
    paths = picture_paths(arguments.images, "--images")
    names = [path.name for path in paths]
    prompts = read_prompts(arguments, names)
    pictures = [load_picture(path) for path in paths]
    scores = {}
    if arguments.backend in ("torchmetrics", "both"):
        scores["torchmetrics"] = clipscore_torchmetrics(pictures, prompts, load_clip(arguments.clip))
    if arguments.backend in ("open_clip", "both"):
        scores["open_clip"] = clipscore_open_clip(pictures, prompts, OpenClipModel(arguments.clip))
    return {
        "clip": arguments.clip,
        "mean": {backend: sum(values) / len(values) for backend, values in scores.items()},
        "pictures": [
            {"picture": name, "prompt": prompt} | {backend: values[i] for backend, values in scores.items()}
            for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        ],
    }


def main() -> None:
    arguments = parse_arguments()
    try:
        result = score(arguments)
    except CersaError as error:
        sys.exit(f"error: {error}")
    backends = list(result["mean"])
    print(f"{'picture':<32}" + "".join(f"{backend:>14}" for backend in backends) + "  prompt")
    for row in result["pictures"]:
        print(f"{row['picture'][:31]:<32}" + "".join(f"{row[backend]:>14.3f}" for backend in backends) + f"  {row['prompt']}")
    print(f"{'mean':<32}" + "".join(f"{result['mean'][backend]:>14.3f}" for backend in backends))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "clipscore.json").write_text(json.dumps(result, indent=2) + "\n")
        with (arguments.output / "clipscore.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(result["pictures"][0]))
            writer.writeheader()
            writer.writerows(result["pictures"])


if __name__ == "__main__":
    main()
