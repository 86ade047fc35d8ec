#!/usr/bin/env python
"""Scores pictures: CLIPScore, similarity to references (CLIP-I, DINO), drift from the base, diversity among seeds.

The pictures come from a folder, with their prompts (--images), or from a pipeline with adapters that draws a list of prompts
(--pipeline). docs/metrics.md explains every number.
"""

import argparse
import inspect
import json
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers import logging as transformers_logging

from cersa_diffusion.errors import CersaError, ConfigError
from cersa_diffusion.metrics.clipscore import BACKENDS, PERCENT
from cersa_diffusion.metrics.drawing import draw, open_pipeline
from cersa_diffusion.metrics.encoders import DREAMBOOTH_ENCODER
from cersa_diffusion.metrics.evaluation import Drift, Evaluation, Sample, Scorer
from cersa_diffusion.metrics.inputs import read_picture_prompts, read_pictures, read_prompt_list
from cersa_diffusion.metrics.prompts import PROMPT_LISTS, dreambooth_prompts, without_token
from cersa_diffusion.pipelines.draw import DRAWING_DTYPES, DTYPE_HELP, generate

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED_CLIP, EMBEDDED_VIT = str(ASSETS / "emoji-clip"), str(ASSETS / "emoji-vit")
PHOTO_CLIP = "openai/clip-vit-base-patch16"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    _add_inputs(parser)
    _add_drawing(parser.add_argument_group("drawing, with --pipeline"))
    _add_scoring(parser.add_argument_group("scoring"))
    parser.add_argument(
        "--output", type=Path, help="folder for scores.json, scores.csv and table.md; with --pipeline for the pictures, too"
    )
    arguments = parser.parse_args()
    if arguments.images and (arguments.prompt_list or arguments.adapter or arguments.drift_prompts or arguments.base):
        parser.error("--prompt_list, --adapter, --drift_prompts and --base belong to --pipeline")
    if bool(arguments.prompt_list) != bool(arguments.subject):
        parser.error("--prompt_list and --subject belong together: --prompt_list live_subject --subject 'sks dog'")
    if arguments.base and not arguments.drift_prompts:
        parser.error("--base is for the drift: name its prompts with --drift_prompts")
    if arguments.drift_prompts and not (arguments.base or arguments.adapter):
        parser.error("--drift_prompts compares with the untouched base: name an --adapter, or the --base of this pipeline")
    return arguments


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of pictures")
    source.add_argument("--pipeline", help="diffusers pipeline that draws: a folder or hub id")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one prompt for all pictures, or to draw")
    prompts.add_argument(
        "--prompts",
        type=Path,
        help="JSON, JSONL, CSV or TXT; for --images file names and prompts, for --pipeline a list of prompts",
    )
    prompts.add_argument("--prompt_list", choices=list(PROMPT_LISTS), help="the 25 prompts of the DreamBooth paper")
    parser.add_argument("--subject", help="subject of --prompt_list, such as 'sks dog'")
    parser.add_argument("--unique_token", help="word to remove from the prompts for the scores, such as the unknown word sks")
    parser.add_argument("--references", type=Path, help="folder with pictures of the subject: adds CLIP-I and DINO")


def _add_drawing(group) -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(generate).parameters.items()}
    group.add_argument("--adapter", nargs="+", default=[], help="CERSA or LoRA files, all active together")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="one picture per prompt and seed")
    group.add_argument("--steps", type=int, default=defaults["steps"], help="number of denoising steps")
    group.add_argument("--guidance", type=float, default=defaults["guidance"], help="scale of classifier-free guidance")
    group.add_argument("--dtype", choices=list(DRAWING_DTYPES), default="auto", help=DTYPE_HELP)
    group.add_argument("--drift_prompts", type=Path, help="list of prompts without the subject: adds the drift")
    group.add_argument("--base", help="base pipeline for the drift; default: --pipeline without the adapters")


def _add_scoring(group) -> None:
    group.add_argument("--backend", choices=[*BACKENDS, "both"], default="torchmetrics", help="library of CLIPScore")
    group.add_argument(
        "--clip",
        default=EMBEDDED_CLIP,
        help="CLIP in transformers' format (folder or hub id), or with --backend open_clip a name of open_clip. The default "
        f"knows only emoji; for photographs use {PHOTO_CLIP} or ViT-B-16:openai",
    )
    group.add_argument(
        "--vision",
        default=EMBEDDED_VIT,
        help=f"vision transformer; the default is not a DINO and knows only emoji; for photographs use {DREAMBOOTH_ENCODER}",
    )
    group.add_argument("--lpips", choices=["alex", "vgg", "squeeze"], help="adds LPIPS to the diversity; downloads its network")
    group.add_argument("--weight", type=float, default=PERCENT, help="factor of CLIPScore; 2.5 in Hessel et al.")
    group.add_argument("--batch_size", type=int, default=16, help="number of pictures per batch")
    group.add_argument("--device", help="default: the GPU if there is one")


def check(arguments: argparse.Namespace) -> None:
    """Refuses numbers and folders that cannot be used, before anything is loaded."""
    for name in ("batch_size", "steps", "weight"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}, expected more than 0")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ConfigError("--prompt is empty, expected words")
    if len(set(arguments.seeds)) != len(arguments.seeds):
        raise ConfigError(f"--seeds {arguments.seeds}: expected different seeds, because the same seed draws the same picture")
    if arguments.output and arguments.output.exists() and not arguments.output.is_dir():
        raise ConfigError(f"--output: {arguments.output} is a file, expected a folder")


def read_samples(arguments: argparse.Namespace) -> list[Sample]:
    """The pictures of --images with their prompts."""
    pictures = read_pictures(arguments.images, "--images")
    prompts = [arguments.prompt] * len(pictures)
    if arguments.prompts:
        prompts = read_picture_prompts(arguments.prompts, list(pictures), "--prompts")
    return [Sample(name, prompt, pictures[name]) for name, prompt in zip(pictures, prompts, strict=True)]


def prompts_to_draw(arguments: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, --prompts or --prompt_list."""
    if arguments.prompt_list:
        return dreambooth_prompts(arguments.prompt_list, arguments.subject)
    return [arguments.prompt] if arguments.prompts is None else read_prompt_list(arguments.prompts, "--prompts")


def as_scored(arguments: argparse.Namespace, prompt: str) -> str:
    """The prompt without the unique token."""
    return without_token(prompt, arguments.unique_token) if arguments.unique_token else prompt


def keep(arguments: argparse.Namespace, name: str, samples: list[Sample]) -> None:
    """Writes drawn pictures and their prompts into a folder of --output, in the form that --images reads."""
    if arguments.output is None:
        return
    folder = arguments.output / name
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        sample.picture.save(folder / sample.name)
    prompts = {sample.name: sample.prompt for sample in samples}
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_scorer(arguments: argparse.Namespace) -> Scorer:
    """Loads the models that score, as the options say."""
    backends = list(BACKENDS) if arguments.backend == "both" else [arguments.backend]
    return Scorer.load(
        arguments.clip,
        backends,
        vision=arguments.vision,
        lpips=arguments.lpips,
        device=arguments.device,
        weight=arguments.weight,
        batch_size=arguments.batch_size,
    )


def score_images(arguments: argparse.Namespace, references: list[Image.Image]) -> Evaluation:
    """Scores the folder --images."""
    samples = read_samples(arguments)
    samples = [replace(sample, prompt=as_scored(arguments, sample.prompt)) for sample in samples]
    return load_scorer(arguments).evaluate(samples, references)


def score_pipeline(arguments: argparse.Namespace, references: list[Image.Image]) -> Evaluation:
    """Draws with --pipeline and scores the pictures; every model is loaded before the first picture is drawn."""
    prompts = prompts_to_draw(arguments)
    drift_prompts = read_prompt_list(arguments.drift_prompts, "--drift_prompts") if arguments.drift_prompts else []
    place = {"device": arguments.device, "dtype": DRAWING_DTYPES[arguments.dtype]}
    pipeline = open_pipeline(arguments.pipeline, arguments.adapter, **place)
    base = open_pipeline(arguments.base or arguments.pipeline, **place) if drift_prompts else None
    scorer = load_scorer(arguments)
    for clip in scorer.clips.values():
        clip.warn_of_truncation([as_scored(arguments, prompt) for prompt in prompts])
    settings = {"steps": arguments.steps, "guidance": arguments.guidance, "batch_size": arguments.batch_size}
    samples = draw(pipeline, prompts, arguments.seeds, **settings)
    keep(arguments, "pictures", samples)
    drift = None
    if drift_prompts:
        tuned, untouched = (draw(model, drift_prompts, arguments.seeds, **settings) for model in (pipeline, base))
        keep(arguments, "drift", tuned)
        keep(arguments, "drift_base", untouched)
        drift = Drift([sample.picture for sample in tuned], [sample.picture for sample in untouched], base.vae)
    return scorer.evaluate([replace(sample, prompt=as_scored(arguments, sample.prompt)) for sample in samples], references, drift)


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """All scores that the options request."""
    check(arguments)
    references = list(read_pictures(arguments.references, "--references").values()) if arguments.references else []
    evaluation = (score_images if arguments.images else score_pipeline)(arguments, references)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    # The same command with another folder has to write the same file.
    del options["output"]
    libraries = {name: version(name) for name in ("torch", "transformers", "diffusers", "torchmetrics", "open_clip_torch")}
    return replace(evaluation, settings=options | {"libraries": libraries})


def main() -> None:
    arguments = parse_arguments()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        evaluation = evaluate(arguments)
        if arguments.output:
            evaluation.write(arguments.output)
    except CersaError as error:
        sys.exit(f"error: {error}")
    print(f"{evaluation}\n\n{len(evaluation.rows)} pictures; CLIP: {arguments.clip}; vision transformer: {arguments.vision}")
    if arguments.clip == EMBEDDED_CLIP:
        print(f"This CLIP knows emoji and nothing else: for photographs use --clip {PHOTO_CLIP} --vision {DREAMBOOTH_ENCODER}")
    if arguments.output:
        print(f"{arguments.output}: scores.json, scores.csv (every picture), table.md")


if __name__ == "__main__":
    main()
