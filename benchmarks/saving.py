#!/usr/bin/env python
"""Saving an adapter: `save_adapter` for every linear layer of a pipeline, and a LoRA (r = 32) of the same layers, in one run.

The figures are medians over several saves that are flushed to the disk. An injected model has its pivots from the decomposition;
"choosing the pivots" measures a model whose bases came from a state dict.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from adapters import LORA_RANK, injected, make_parser
from diffusers.utils import logging

import cersa_diffusion as cersa
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.methods.base import Origin
from cersa_diffusion.methods.lora import LoraMethod
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.pipelines.open import load_base


def timed(save: Callable[[], None], before: Callable[[], None], repeats: int) -> list[float]:
    """The seconds of every save."""
    seconds = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        save()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CERSA_CACHE"] = str(folder / "cache")
        models = injected(arguments.base, arguments.alpha)
        layers = [layer for model in models.values() for layer in cersa_layers(model).values()]
        untrained = load_base(arguments.base)
        lora = LoraMethod(MethodSettings(method="lora", rank=LORA_RANK), STABLE_DIFFUSION.trained)
        components = STABLE_DIFFUSION.components(untrained)
        for component, model in components.items():
            lora.prepare(component, model)

        def save_cersa() -> None:
            cersa.save_adapter(models, folder / "cersa.safetensors")

        def save_as_lora() -> None:
            lora.save(components, folder, Origin(arguments.base), {})

        def forget_pivots() -> None:
            for layer in layers:
                layer.load_state_dict(layer.state_dict())

        rows = {
            "LoRA r = 32": timed(save_as_lora, lambda: None, arguments.repeats),
            "CERSA": timed(save_cersa, lambda: None, arguments.repeats),
            "CERSA, choosing the pivots": timed(save_cersa, forget_pivots, arguments.repeats),
        }
    print(f"{len(layers)} layers, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}\n")
    print("| | seconds | lowest | highest |\n|---|---|---|---|")
    for title, seconds in rows.items():
        print(f"| {title} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
