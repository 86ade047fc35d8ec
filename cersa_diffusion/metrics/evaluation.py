"""All scores of a set of pictures, and the files and the table that hold them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.metrics.clip_models import ClipModel
from cersa_diffusion.metrics.clipscore import BACKENDS, PERCENT
from cersa_diffusion.metrics.encoders import VisionEncoder
from cersa_diffusion.metrics.similarity import Lpips, diversity, latent_distance, paired_distance, similarity_to_references
from cersa_diffusion.text import csv_text, table

# Scores are rounded before they are written, because their last bits depend on the number of threads.
DIGITS = 5


@dataclass(frozen=True)
class Sample:
    """A picture to score.

    Args:
        name: file name.
        prompt: the text that the picture is scored with.
        picture: RGB.
        seed: the seed of the drawing, if it is known.
    """

    name: str
    prompt: str
    picture: Image.Image
    seed: int | None = None


@dataclass(frozen=True)
class Drift:
    """Pictures of prompts without the subject, by the tuned model and by the untouched base, with the same seeds.

    Args:
        pictures: pictures of the tuned model.
        base: pictures of the base, in the same order.
        autoencoder: autoencoder of the base; adds the distance between latents.
    """

    pictures: Sequence[Image.Image]
    base: Sequence[Image.Image]
    autoencoder: AutoencoderKL | None = None


@dataclass(frozen=True)
class Scorer:
    """The models that score.

    Args:
        clips: backend (a key of `BACKENDS`) -> its model, at least one; the first model also gives the picture features.
        vision: a vision transformer, such as DINO.
        lpips: adds LPIPS to the diversity.
        weight: factor of CLIPScore.
        batch_size: number of pictures per forward pass.
    """

    clips: Mapping[str, ClipModel]
    vision: VisionEncoder | None = None
    lpips: Lpips | None = None
    weight: float = PERCENT
    batch_size: int = 32

    @classmethod
    def load(
        cls,
        clip: str,
        backends: Sequence[str],
        *,
        vision: str | None = None,
        lpips: str | None = None,
        device: str | torch.device | None = None,
        **settings,
    ) -> "Scorer":
        """Loads the models.

        Args:
            clip: name or path of a CLIP that all backends can load.
            backends: keys of `BACKENDS`.
            vision: name or path of a vision transformer, or None.
            lpips: network of LPIPS, or None.
            device: where to compute; by default the GPU if there is one.
            settings: weight, batch_size.

        Raises:
            ConfigError: a backend is unknown, or a model cannot be loaded.
        """
        unknown = [backend for backend in backends if backend not in BACKENDS]
        if unknown or not backends:
            raise ConfigError(f"CLIPScore backends {list(backends)}: expected some of {', '.join(BACKENDS)}")
        clips = {backend: BACKENDS[backend][0](clip, device) for backend in backends}
        encoder = VisionEncoder(vision, device) if vision else None
        return cls(clips, encoder, Lpips(lpips, next(iter(clips.values())).device) if lpips else None, **settings)

    def evaluate(
        self, samples: Sequence[Sample], references: Sequence[Image.Image] = (), drift: Drift | None = None
    ) -> "Evaluation":
        """Scores pictures.

        Args:
            samples: the pictures with their prompts; the diversity compares the pictures of the same prompt.
            references: pictures of the subject, for CLIP-I and DINO.
            drift: pictures of prompts without the subject.

        Raises:
            ConfigError: there are no pictures.
        """
        pictures, prompts = [sample.picture for sample in samples], [sample.prompt for sample in samples]
        groups = [group for group in _indices_by_prompt(prompts) if len(group) > 1]
        columns = {
            f"clipscore_{backend}": BACKENDS[backend][1](pictures, prompts, clip, weight=self.weight, batch_size=self.batch_size)
            for backend, clip in self.clips.items()
        }
        means = {}
        for encoder in [next(iter(self.clips.values())), *([self.vision] if self.vision else [])]:
            key, features = encoder.label.lower().replace(" ", "_"), encoder.embed_pictures(pictures, self.batch_size)
            if references:
                similarities = similarity_to_references(features, encoder.embed_pictures(references, self.batch_size))
                columns["clip_i" if encoder.label == "CLIP" else key] = similarities.tolist()
            if groups:
                means[f"diversity_{key}"] = _mean([diversity(features[group]) for group in groups])
            if drift:
                drawn, base = (encoder.embed_pictures(side, self.batch_size) for side in (drift.pictures, drift.base))
                means[f"drift_{key}"] = paired_distance(drawn, base)
        if groups and self.lpips:
            means["diversity_lpips"] = _mean([self.lpips.diversity([pictures[i] for i in group]) for group in groups])
        if drift and drift.autoencoder:
            means["drift_latent"] = latent_distance(list(drift.pictures), list(drift.base), drift.autoencoder)
        means = {name: _mean(values) for name, values in columns.items()} | dict(sorted(means.items()))
        return Evaluation(_round_values(means), _rows_of_pictures(samples, columns))


@dataclass(frozen=True)
class Evaluation:
    """Scores; ``str()`` is the table of the means in Markdown.

    Attributes:
        means: measure -> value.
        rows: file name, prompt, seed and scores of each picture.
        settings: settings that led to the scores, for the files.
    """

    means: dict[str, float]
    rows: list[dict]
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [[name, f"{value:.4f}", "lower" if name.startswith("drift") else "higher"] for name, value in self.means.items()]
        return table(["measure", "mean", "better"], rows, markdown=True)

    def write(self, folder: str | Path) -> None:
        """Writes scores.json (everything), scores.csv (a row per picture) and table.md (the means); creates the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "means": self.means, "pictures": self.rows}
        (folder / "scores.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "scores.csv").write_text(csv_text(self.rows), encoding="utf-8", newline="")
        (folder / "table.md").write_text(f"{self}\n", encoding="utf-8")


def _indices_by_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """For each different prompt the indices of its pictures."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return list(groups.values())


def _rows_of_pictures(samples: Sequence[Sample], columns: Mapping[str, Sequence[float]]) -> list[dict]:
    rows = []
    for index, sample in enumerate(samples):
        row = {"picture": sample.name, "prompt": sample.prompt} | ({} if sample.seed is None else {"seed": sample.seed})
        rows.append(row | _round_values({name: values[index] for name, values in columns.items()}))
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _round_values(values: dict) -> dict:
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in values.items()}
