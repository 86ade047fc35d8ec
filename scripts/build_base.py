#!/usr/bin/env python
"""Build the embedded models: a tiny text-to-image base, a CLIP that scores it, and a subject to learn.

The stages run one after the other; a finished stage is not repeated, and an interrupted stage continues from its last
checkpoint. Delete the folder of a stage below the work folder to train it again. On a machine that does other work, set
GOMP_SPINCOUNT=2000; otherwise the threads of a training step wait for each other in busy loops.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from embedded_base.autoencoder import train_autoencoder
from embedded_base.clip import train_clip
from embedded_base.diffusion import train_diffusion, warm_up_text_encoder
from embedded_base.export import export
from embedded_base.fetch import fetch
from embedded_base.render import render_all
from embedded_base.settings import Folders
from embedded_base.tokenizer import train_tokenizer
from embedded_base.vit import train_vit

ROOT = Path(__file__).resolve().parents[1]

STAGES = {
    "fetch": "the artwork and the names, through npm",
    "render": "all pictures at 64 x 64, with transparency",
    "tokenizer": "a byte-pair tokenizer over all names",
    "autoencoder": "pictures to latents and back",
    "clip": "the model that scores pictures",
    "vit": "the model that names the group of a picture, for classification",
    "text": "warm-up of the base's text encoder",
    "diffusion": "the denoiser together with the text encoder",
    "export": "model folders, cards, sample sheet and subjects",
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="stages:\n" + "\n".join(f"  {name:12} {text}" for name, text in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=STAGES, help="run this stage only (default: all, in order)")
    vocabularies = ("small", "medium", "full")
    parser.add_argument("--vocabulary", choices=vocabularies, default="medium", help="names to learn (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build/embedded_base", help="checkpoints and pictures")
    parser.add_argument("--assets-dir", type=Path, default=ROOT / "assets", help="where the results go")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    steps = parser.add_argument_group("length of the training; the defaults are those of the shipped models")
    for stage, default, batch in (
        ("autoencoder", 3000, 16),
        ("first-clip", 3200, 128),
        ("clip", 4000, 128),
        ("vit", 500, 128),
        ("text", 400, 64),
        ("first-diffusion", 1550, 64),
        ("diffusion", 3300, 64),
    ):
        text = f"steps of {batch} samples (default: %(default)s)"
        steps.add_argument(f"--{stage}-steps", type=int, default=default, help=text)
    return parser.parse_args()


def stage_functions(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The function of each stage.

    Args:
        arguments: The command line.
    """
    folders = Folders(arguments.work_dir, arguments.assets_dir, arguments.vocabulary)
    return {
        "fetch": lambda: fetch(folders),
        "render": lambda: render_all(folders),
        "tokenizer": lambda: train_tokenizer(folders),
        "autoencoder": lambda: train_autoencoder(folders, arguments.autoencoder_steps),
        "clip": lambda: train_clip(folders, arguments.first_clip_steps, arguments.clip_steps),
        "vit": lambda: train_vit(folders, arguments.vit_steps),
        "text": lambda: warm_up_text_encoder(folders, arguments.text_steps),
        "diffusion": lambda: train_diffusion(folders, arguments.first_diffusion_steps, arguments.diffusion_steps),
        "export": lambda: export(folders),
    }


def main() -> None:
    """Run the stages."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    for name, function in stage_functions(arguments).items():
        if arguments.stage in (None, name):
            function()


if __name__ == "__main__":
    main()
