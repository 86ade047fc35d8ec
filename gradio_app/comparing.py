"""One comparison: its settings and their checks, and its pictures, drawn one after the other."""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.methods.table import METHODS
from cersa_diffusion.metrics.prompts import without_token
from cersa_diffusion.pipelines.draw import generate
from gradio_app.library import Base, Run
from gradio_app.settings import Limits
from gradio_app.store import PipelineStore, weight_bytes

UNTOUCHED = "untouched base"
SCHEDULERS = {
    "as saved": None,
    "DDIM": DDIMScheduler,
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "UniPC": UniPCMultistepScheduler,
}
STRONGEST = 1.5
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_STEPS, MOST_GUIDANCE, HIGHEST_SEED = 100, 30.0, 2**32 - 1


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison: its rows are prompts x seeds, its columns are the untouched base or runs.

    Args:
        base: name of a base.
        columns: `UNTOUCHED` or names of runs.
        strengths: name of a run -> its strength; by default 1.
        prompts: the prompts.
        negative_prompt: the prompt that guidance moves away from.
        seeds: the seeds, the same for every column.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance.
        scheduler: a key of `SCHEDULERS`.
        token: the word that stands for the subject; it is removed from the prompts before they are scored.
    """

    base: str
    columns: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    strengths: Mapping[str, float] = field(default_factory=dict)
    negative_prompt: str = ""
    steps: int = 25
    guidance: float = 4.0
    scheduler: str = "as saved"
    token: str = "sks"

    def rows(self) -> list[tuple[str, int]]:
        """(prompt, seed) of the rows."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def check(self, limits: Limits) -> None:
        """Checks everything except the names.

        Raises:
            ConfigError: a setting cannot be used; the message says what to do.
        """
        _check_between("columns", len(self.columns), 1, limits.columns, "choose the base or some runs")
        _check_between("prompts", len(self.prompts), 1, limits.prompts, "write one per line")
        _check_between("seeds", len(self.seeds), 1, limits.seeds, "write them as 0, 1, 2 or as 0-2")
        _check_between("pictures", len(self.rows()) * len(self.columns), 1, limits.drawn, "take fewer prompts, seeds or columns")
        _check_between("steps", self.steps, 1, MOST_STEPS)
        _check_between("guidance", self.guidance, 0, MOST_GUIDANCE)
        for text in (*self.prompts, self.negative_prompt, self.token):
            _check_between("characters of a prompt", len(text), 0, limits.characters, "shorten it")
        for seed in self.seeds:
            _check_between("seed", seed, 0, HIGHEST_SEED)
        for name, strength in self.strengths.items():
            _check_between(f"strength of {name}", strength, 0, STRONGEST)
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"scheduler {self.scheduler!r}: expected one of {', '.join(SCHEDULERS)}")

    def to_json(self) -> str:
        """The settings as one line of JSON, to share them."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """The inverse of `to_json`; missing settings have their defaults.

        Raises:
            ConfigError: the text is not such JSON.
        """
        try:
            values = json.loads(text)
            unknown = set(values) - {setting.name for setting in fields(cls)}
            if unknown:
                raise ConfigError(f"settings: {', '.join(sorted(unknown))} is not a setting of a comparison")
            return cls(**{name: _PARSERS[name](value) for name, value in values.items()})
        except ConfigError:
            raise
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"settings: the text is not JSON as this page writes it ({error})") from error


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("expected a list of texts")
    return tuple(value)


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text instead of {value!r}")
    return value


_PARSERS = {
    "base": _text, "columns": _texts, "prompts": _texts, "negative_prompt": _text, "scheduler": _text, "token": _text,
    "seeds": lambda value: tuple(int(seed) for seed in value),
    "strengths": lambda value: {_text(name): float(strength) for name, strength in value.items()},
    "steps": int, "guidance": float,
}  # fmt: skip


def _check_between(what: str, value: float, lowest: float, highest: float, remedy: str = "") -> None:
    if not lowest <= value <= highest:
        raise ConfigError(f"{what}: {value}, expected {lowest} to {highest}" + (f": {remedy}" if remedy else ""))


def parse_seeds(text: str, most: int) -> tuple[int, ...]:
    """Seeds written as "0, 1, 5" or "0-3".

    Args:
        text: the text of the field.
        most: largest number of seeds.

    Raises:
        ConfigError: the text has another form, or there are too many seeds.
    """
    seeds: list[int] = []
    for number_or_range in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", number_or_range, re.ASCII)
        if not match:
            raise ConfigError(f"seeds: {text.strip()[:40]!r}, expected numbers such as 0, 1, 2 or a range such as 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(seeds) + last - first + 1 > most:
            raise ConfigError(f"seeds: {text.strip()[:40]!r} has more than {most} seeds: take fewer")
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))


@dataclass(frozen=True)
class Drawn:
    """A finished picture.

    Args:
        row: number of the row.
        column: number of the column.
        picture: RGB.
        seconds: time of the drawing, without loading.
        score: CLIPScore with its prompt, 0 to 100; None without a CLIP.
        memory: bytes of all weights of the pipeline; on a GPU the peak of the allocated bytes during the drawing.
    """

    row: int
    column: int
    picture: Image.Image
    seconds: float
    score: float | None
    memory: int


class Scorer:
    """CLIPScore of single pictures by the function of the package; the CLIP is loaded at the first score.

    Args:
        clip: folder or hub id of the CLIP; None: pictures are not scored.
        device: where it computes.
        loading: lock that is held while the model is loaded (see `PipelineStore`).
    """

    def __init__(self, clip: str | None, device: str, loading: AbstractContextManager):
        self.clip, self.device, self.loading = clip, device, loading
        self._lock, self._model = threading.Lock(), None

    def score(self, picture: Image.Image, prompt: str) -> float | None:
        """CLIPScore, 0 to 100; None without a CLIP."""
        if self.clip is None:
            return None
        # Imported here, because the page also works without the extra `score`.
        from cersa_diffusion.metrics.clip_models import TransformersClip
        from cersa_diffusion.metrics.clipscore import clipscore_torchmetrics

        with self._lock:
            if self._model is None:
                with self.loading:
                    self._model = TransformersClip(self.clip, self.device)
            return clipscore_torchmetrics([picture], [prompt], self._model)[0]


def draw(comparison: Comparison, base: Base, runs: Sequence[Run | None], store: PipelineStore, scorer: Scorer) -> Iterator[Drawn]:
    """Yields the pictures of a comparison, column by column, each as soon as it is finished.

    Args:
        comparison: the checked settings.
        base: the base.
        runs: runs of the columns; None for the untouched base.
        store: gives the pipelines.
        scorer: gives the CLIPScore.
    """
    for column, run in enumerate(runs):
        strength = None if run is None else comparison.strengths.get(run.name, 1.0)
        for row, (prompt, seed) in enumerate(comparison.rows()):
            # One lease per picture, so that others can draw between two pictures, and a visitor can leave.
            with store.lease(base, run) as pipeline:
                if run is not None and run.has_strength:
                    set_strength(pipeline, run, strength)
                drawn = _draw_one(pipeline, comparison, row, column, prompt, seed)
            yield replace(drawn, score=scorer.score(drawn.picture, without_token(prompt, comparison.token)))


def draw_sweep(
    comparison: Comparison, base: Base, run: Run, store: PipelineStore, scorer: Scorer, strengths: Sequence[float] = SWEEP
) -> Iterator[Drawn]:
    """Yields the pictures of the first row of a comparison, by one adapter with a strength per column.

    Args:
        comparison: the checked settings.
        base: the base.
        run: the adapter.
        store: gives the pipelines.
        scorer: gives the CLIPScore.
        strengths: the strengths.

    Raises:
        ConfigError: the run has no strength.
    """
    if not run.has_strength:
        raise ConfigError(f"{run.name} is a fully fine-tuned model, which has no strength: choose a CERSA or LoRA run")
    first = replace(comparison, prompts=comparison.prompts[:1], seeds=comparison.seeds[:1])
    for column, strength in enumerate(strengths):
        for drawn in draw(replace(first, strengths={run.name: strength}), base, [run], store, scorer):
            yield replace(drawn, column=column)


def set_strength(pipeline: DiffusionPipeline, run: Run, strength: float) -> None:
    """Sets the strength of the adapter in the pipeline of a run."""
    if issubclass(METHODS[run.method], CersaMethod):
        names = {name for names in pipeline.get_list_cersa_adapters().values() for name in names}
        pipeline.set_cersa_adapters(sorted(names), strength)
    else:
        names = {name for names in pipeline.get_list_adapters().values() for name in names}
        pipeline.set_adapters(sorted(names), [strength] * len(names))


def _draw_one(pipeline: DiffusionPipeline, comparison: Comparison, row: int, column: int, prompt: str, seed: int) -> Drawn:
    saved, chosen = pipeline.scheduler, SCHEDULERS[comparison.scheduler]
    on_gpu = pipeline.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(pipeline.device)
    try:
        if chosen is not None:
            pipeline.scheduler = chosen.from_config(saved.config)
        start = time.perf_counter()
        [[picture]] = generate(
            pipeline,
            [prompt],
            [seed],
            steps=comparison.steps,
            guidance=comparison.guidance,
            negative_prompt=comparison.negative_prompt,
        )
        seconds = time.perf_counter() - start
    finally:
        pipeline.scheduler = saved
    memory = torch.cuda.max_memory_allocated(pipeline.device) if on_gpu else weight_bytes(pipeline)
    return Drawn(row, column, picture, seconds, None, memory)
