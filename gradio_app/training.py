"""The form of the Train tab, the settings of its run, and the memory plan of this run."""

import copy
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from cersa_diffusion.config import PRECISIONS
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.families.sdxl import STABLE_DIFFUSION_XL
from cersa_diffusion.families.table import family_of
from cersa_diffusion.methods.table import METHODS, make_method
from cersa_diffusion.pipelines.tokens import pipeline_tokens
from cersa_diffusion.training import PRESETS, DreamBoothConfig, DreamBoothXLConfig
from cersa_diffusion.training.run.memory import memory_table, planned_memory
from gradio_app.settings import Limits

NO_PRESET = "none"
# Characters per line of the plan.
PLAN_WIDTH = 48
PRESET_CHOICES = [NO_PRESET, *PRESETS]
# The better of the rates that were tried on the embedded base (see docs/demo.md); the text encoder has a tenth of the rate.
LEARNING_RATES = {"cersa": 1e-3, "lora": 1e-3, "pissa": 3e-4, "dora": 1e-3, "svfit": 1e-2, "svft": 1e-2, "full": 3e-4}
RANKED = ("lora", "pissa", "dora")
CLASS_PICTURES = 24
# (base, pictures, resolution) -> number of tokens that each layer gets in a step.
_TOKEN_COUNTS: dict[tuple[str, int, int], dict] = {}


@dataclass(frozen=True)
class TrainForm:
    """The values of the form.

    Args:
        base: name of a base.
        method: a key of `METHODS`.
        preset: a key of `PRESETS`, or `NO_PRESET`.
        alpha, beta: shares of energy, for CERSA; with beta at or above alpha, the whole kept subspace is trained.
        memory_budget: such as "600MB"; replaces alpha and beta; may be empty.
        rank_multiple: the ranks of CERSA are rounded up to multiples of it.
        uniform_blocks: one rank for equal layers of repeated blocks, for CERSA.
        rank: rank of LoRA, PiSSA and DoRA.
        instance_prompt: prompt that names the subject.
        class_prompt: prompt that names its class, for prior preservation; may be empty.
        preview_prompt: prompt of the previews; if empty, the prompt of the subject.
        steps, learning_rate, batch_size, seed: as in `DreamBoothConfig`.
    """

    base: str
    method: str = "cersa"
    preset: str = NO_PRESET
    alpha: float = 0.95
    beta: float = 0.95
    memory_budget: str = ""
    rank_multiple: int = 8
    uniform_blocks: bool = False
    rank: int = 32
    instance_prompt: str = "a 3d emoji of a sks robot"
    class_prompt: str = ""
    preview_prompt: str = ""
    steps: int = 300
    learning_rate: float = 1e-3
    batch_size: int = 4
    seed: int = 0

    def check(self, limits: Limits) -> None:
        """Checks the values that the settings of a run do not check themselves.

        Raises:
            ConfigError: a value cannot be used.
        """
        if self.method not in METHODS or self.preset not in PRESET_CHOICES:
            raise ConfigError(f"method {self.method!r} with preset {self.preset!r}: choose both from the lists")
        if not 1 <= self.steps <= limits.train_steps:
            raise ConfigError(f"steps: {self.steps}, expected 1 to {limits.train_steps}")
        if not 1 <= self.batch_size <= 64:
            raise ConfigError(f"pictures per step: {self.batch_size}, expected 1 to 64")
        for text in (self.instance_prompt, self.class_prompt, self.preview_prompt):
            if len(text) > limits.characters:
                raise ConfigError(f"a prompt has {len(text)} characters, expected at most {limits.characters}")

    def config(self, pipeline: DiffusionPipeline, source: str, output_dir: Path, limits: Limits) -> DreamBoothConfig:
        """The settings of the run.

        Args:
            pipeline: the base, for its family and the size of its pictures.
            source: folder or hub id of the base.
            output_dir: folder of the run; the pictures are in its folder "pictures".
            limits: the limits of requests.

        Raises:
            ConfigError: a value cannot be used.
        """
        self.check(limits)
        preset = PRESETS.get(self.preset, {})
        if preset.get("mixed_precision") == "fp16" and not torch.cuda.is_available():
            raise ConfigError(f"preset {self.preset} computes in float16, which needs a GPU: choose another preset")
        return self._config(pipeline, source, output_dir, preset)

    def _config(self, pipeline: DiffusionPipeline, source: str, output_dir: Path, preset: Mapping) -> DreamBoothConfig:
        settings = dict(preset) | self._method_settings() | {
            "pretrained_model_name_or_path": source,
            "instance_data_dir": str(output_dir / "pictures"),
            "instance_prompt": self.instance_prompt.strip(),
            "output_dir": str(output_dir),
            "resolution": native_size(pipeline),
            "center_crop": True,
            "max_train_steps": int(self.steps),
            "learning_rate": float(self.learning_rate),
            "text_encoder_lr": float(self.learning_rate) / 10 if preset.get("train_text_encoder", True) else None,
            "lr_scheduler": "cosine",
            "seed": int(self.seed),
            "validation_prompt": self.preview_prompt.strip() or self.instance_prompt.strip(),
            "num_validation_images": 2,
            "validation_steps": max(25, int(self.steps) // 4),
            "checkpointing_steps": max(50, int(self.steps) // 4),
            "checkpoints_total_limit": 1,
        }  # fmt: skip
        settings.setdefault("train_batch_size", int(self.batch_size))
        if self.class_prompt.strip():
            settings |= {
                "with_prior_preservation": True,
                "class_prompt": self.class_prompt.strip(),
                "class_data_dir": str(output_dir / "class_pictures"),
                "num_class_images": CLASS_PICTURES,
            }
        family = family_of(type(pipeline).__name__)
        return (DreamBoothXLConfig if family is STABLE_DIFFUSION_XL else DreamBoothConfig)(**settings)

    def _method_settings(self) -> dict:
        settings: dict = {"method": self.method}
        if self.method in RANKED:
            settings["rank"] = int(self.rank)
        if self.method == "cersa":
            settings |= {"rank_multiple": int(self.rank_multiple), "uniform_blocks": bool(self.uniform_blocks)}
            if self.memory_budget.strip():
                settings["memory_budget"] = self.memory_budget.strip()
            else:
                settings["alpha"] = float(self.alpha)
                settings["beta"] = float(self.beta) if self.beta < self.alpha else None
        return settings

    def plan(self, pipeline: DiffusionPipeline, source: str, limits: Limits) -> str:
        """The memory plan of the training, with LoRA and full fine-tuning, as a table.

        Args:
            pipeline: the untouched base, leased.
            source: folder or hub id of the base.
            limits: the limits of requests.

        Raises:
            ConfigError: the settings cannot be used.
        """
        self.check(limits)
        config = self._config(pipeline, source, Path("planned"), PRESETS.get(self.preset, {}))
        method = make_method(config, config.targets)
        components = config.family.components(pipeline, text_encoders=config.train_text_encoder)
        dtype = PRECISIONS[config.mixed_precision]
        pictures = config.train_batch_size * (2 if config.with_prior_preservation else 1)
        tokens = _tokens(pipeline, source, pictures, config.resolution)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            uses = planned_memory(config, method, components, dtype=dtype, tokens=tokens)
        caption, table = memory_table(uses, config, dtype).split("\n", 1)
        return f"{table}\n\n{textwrap.fill(caption, PLAN_WIDTH)}"


def _tokens(pipeline: DiffusionPipeline, source: str, pictures: int, resolution: int) -> dict:
    # lru_cache is not used, because it would keep the pipelines in memory.
    key = (source, pictures, resolution)
    if key not in _TOKEN_COUNTS:
        _TOKEN_COUNTS[key] = pipeline_tokens(_copy_with_shared_weights(pipeline), pictures, resolution)
    return _TOKEN_COUNTS[key]


def _copy_with_shared_weights(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A copy for the count of tokens, which adds hooks to layers with which others may be drawing."""
    copied = copy.copy(pipeline)
    for name, model in family_of(type(pipeline).__name__).components(pipeline).items():
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        setattr(copied, name, copy.deepcopy(model, shared))
    return copied


def native_size(pipeline: DiffusionPipeline) -> int:
    """Width and height in pixels of the pictures for which a base was trained."""
    return family_of(type(pipeline).__name__).native_resolution(pipeline)
