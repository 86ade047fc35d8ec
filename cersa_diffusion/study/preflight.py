"""Checks that need the models, before the first training: they load, the prompts fit, and which ranks take the same bytes."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from cersa_diffusion.config import PRECISIONS, parse_bytes
from cersa_diffusion.errors import CersaError, ConfigError
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.memory.budget import dense_layers, untouched_bytes
from cersa_diffusion.memory.cost import lora_memory
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.metrics.prompts import without_token
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.study.cells import write_json
from cersa_diffusion.study.definition import Row, Study
from cersa_diffusion.study.judging import load_scorer
from cersa_diffusion.training.run.optimizers import optimizer_name
from cersa_diffusion.training.settings.config import DreamBoothConfig


def preflight(study: Study, path: Path) -> None:
    """Loads all models once; writes the rows of matched memory or the error, and the warnings, as JSON to `path`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            outcome = {"rows": [vars(row) for row in check_models(study)]}
        except CersaError as error:
            outcome = {"error": str(error)}
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    write_json(path, outcome | {"warnings": list(dict.fromkeys(messages))})


def check_models(study: Study) -> list[Row]:
    """Loads the base and the models that score; returns the rows of matched memory.

    Raises:
        CersaError: a model cannot be loaded, or no rank fits the bytes of matched memory.
    """
    base, scorer = load_base(study.place(study.base)), load_scorer(study)
    subjects = study.read_subjects()
    prompts = [prompt for subject in subjects.values() for part in subject.parts.values() for prompt in part.prompts]
    for clip in scorer.clips.values():
        clip.warn_of_truncation([without_token(prompt, study.unique_token) for prompt in prompts])
    config = study.config(Row("cersa", "cersa"), next(iter(subjects.values())), class_data_dir="class_pictures")
    return matched_rows(study, base, config)


def matched_rows(study: Study, base: DiffusionPipeline, config: DreamBoothConfig) -> list[Row]:
    """LoRA and CERSA with the same bytes of weights, gradients and optimizer state of the trained components.

    Args:
        study: the comparison; its `matched_memory` gives the rank or the budget.
        base: the base pipeline.
        config: the settings that all rows share.

    Raises:
        ConfigError: no LoRA fits the budget, or the bytes are too few for CERSA.
    """
    matched = study.matched_memory
    if matched is None:
        return []
    components = config.family.components(base, text_encoders=config.train_text_encoder)
    lora_bytes = _lora_bytes(components, config)
    rank = matched.lora_rank or _highest_rank(lora_bytes, parse_bytes(matched.budget, "matched_memory.budget"))
    budget = str(lora_bytes(rank))
    method = CersaMethod(replace(config, memory_budget=budget), config.targets)
    # A budget that is too small fails here and not in the middle of the comparison; the decompositions stay in the cache.
    method.plan(components, PRECISIONS[config.mixed_precision])
    return [
        Row("lora-matched", "lora", {"rank": rank}, tuple(matched.learning_rates["lora"])),
        Row("cersa-matched", "cersa", {"memory_budget": budget}, tuple(matched.learning_rates["cersa"])),
    ]


def _lora_bytes(components: Mapping[str, nn.Module], config: DreamBoothConfig) -> Callable[[int], int]:
    """A function from the rank to the bytes of LoRA, as the memory plan counts them."""
    targets = config.targets
    linears = {
        f"{component}.{name}": layer
        for component, model in components.items()
        for name, layer in match_targets(model, targets[component]).items()
    }
    dtype, optimizer = PRECISIONS[config.mixed_precision], optimizer_name(config)
    layers = dense_layers(components, linears, dtype, None).values()
    frozen = sum(untouched_bytes(components, list(linears.values()), dtype).values())
    return lambda rank: frozen + sum(lora_memory(layer, rank, optimizer).total for layer in layers)


def _highest_rank(lora_bytes: Callable[[int], int], budget: int) -> int:
    if lora_bytes(1) > budget:
        raise ConfigError(
            f"matched_memory.budget is {budget / 1e6:.1f} MB, LoRA of rank 1 takes {lora_bytes(1) / 1e6:.1f} MB: raise the budget"
        )
    rank = 1
    while lora_bytes(rank + 1) <= budget:
        rank += 1
    return rank


def read_preflight(path: Path) -> tuple[Row, ...]:
    """The rows that a preflight wrote; repeats its warnings.

    Raises:
        ConfigError: the preflight ended with an error.
    """
    outcome = json.loads(path.read_text(encoding="utf-8"))
    for message in outcome["warnings"]:
        warnings.warn(message, stacklevel=2)
    if "error" in outcome:
        raise ConfigError(outcome["error"])
    return tuple(Row(**row | {"learning_rates": tuple(row["learning_rates"])}) for row in outcome["rows"])
