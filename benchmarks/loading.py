#!/usr/bin/env python
"""Loading an adapter: `load_cersa_weights` with and without cached decompositions, and `load_lora_weights`, in one run.

The LoRA is the same adapter, exported at rank 32, for the same layers of the same pipeline. Every figure is a median; the base
is loaded again before each measurement, outside the measured time.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from adapters import LORA_RANK, injected, make_parser
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging

import cersa_diffusion as cersa
from cersa_diffusion.pipelines.open import load_base


def make_files(base: str, folder: Path, alpha: float) -> dict[str, Path]:
    """Files of an adapter with a change in every layer: without its bases, with its bases, and as a LoRA."""
    models = injected(base, alpha)
    files = {name: folder / f"{name}.safetensors" for name in ("cersa", "cersa with bases", "lora")}
    cersa.save_adapter(models, files["cersa"])
    cersa.save_adapter(models, files["cersa with bases"], save_bases=True)
    cersa.export_lora(models, files["lora"], rank=LORA_RANK, inputs={})
    return files


def measure(base: str, load: Callable[[StableDiffusionPipeline], None], repeats: int, before: Callable[[], None]) -> dict:
    """Median, lowest and highest seconds that `load` takes on a new pipeline."""
    seconds = []
    for _ in range(repeats):
        pipeline = load_base(base)
        pipeline.set_progress_bar_config(disable=True)
        before()
        start = time.perf_counter()
        load(pipeline)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CERSA_CACHE"] = str(folder / "cache")
        files = make_files(arguments.base, folder, arguments.alpha)

        def cache_off() -> None:
            os.environ["CERSA_CACHE"] = "off"

        def cache_on() -> None:
            os.environ["CERSA_CACHE"] = str(folder / "cache")

        runs = {
            "LoRA": (lambda pipeline: pipeline.load_lora_weights(files["lora"]), cache_off),
            "CERSA, decomposing": (lambda pipeline: pipeline.load_cersa_weights(files["cersa"]), cache_off),
            "CERSA, from cache": (lambda pipeline: pipeline.load_cersa_weights(files["cersa"]), cache_on),
            "CERSA, bases in the file": (lambda pipeline: pipeline.load_cersa_weights(files["cersa with bases"]), cache_off),
        }
        sizes = dict(
            zip(runs, (files[name].stat().st_size for name in ("lora", "cersa", "cersa", "cersa with bases")), strict=True)
        )
        rows = {title: measure(arguments.base, load, arguments.repeats, before) for title, (load, before) in runs.items()}
    lora = rows["LoRA"]["seconds"]
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{arguments.base}, alpha {arguments.alpha}, LoRA rank {LORA_RANK}, {threads}")
    print(f"{'':26} {'seconds':>8} {'lowest':>8} {'highest':>8} {'x LoRA':>8} {'file MiB':>9}")
    for title, row in rows.items():
        row |= {"ratio_to_lora": row["seconds"] / lora, "file_bytes": sizes[title]}
        figures = f"{row['seconds']:8.2f} {row['lowest']:8.2f} {row['highest']:8.2f} {row['ratio_to_lora']:8.2f}"
        print(f"{title:26} {figures} {sizes[title] / 2**20:9.1f}")
    if arguments.output:
        Path(arguments.output).write_text(
            json.dumps({"base": arguments.base, "alpha": arguments.alpha, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
