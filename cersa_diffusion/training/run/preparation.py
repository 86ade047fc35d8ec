"""Preparing the models of a run: memory plan, caches, the change of the layers for the method, precision and device.

The base is in CPU memory, and only what is needed there is on the device: first the models that encode pictures and prompts, then
one weight after the other in its final form. Preparing then takes no more memory than training.
"""

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from torch import nn

from cersa_diffusion.config import PRECISIONS
from cersa_diffusion.methods.base import Method
from cersa_diffusion.pipelines.offload import run_from_cpu
from cersa_diffusion.pipelines.tokens import pipeline_tokens
from cersa_diffusion.private_names import enable_gradient_checkpointing
from cersa_diffusion.processes import share_bases
from cersa_diffusion.training.data.captions import Example, caption_summary
from cersa_diffusion.training.data.latent_cache import LatentCache, cache_latents, cache_text_embeddings
from cersa_diffusion.training.run.loss import DreamBoothLoss
from cersa_diffusion.training.run.memory import memory_table, planned_memory, planned_preparing, planned_training
from cersa_diffusion.training.run.optimizers import optimizer_name
from cersa_diffusion.training.run.truncation import TruncationCost, probe_loss
from cersa_diffusion.training.settings.config import DreamBoothConfig


class Preparation:
    """Prepares the models of a run for its method.

    Args:
        config: the settings.
        base: the base pipeline in CPU memory; its models are changed in place.
        accelerator: device, precision and processes.
        method: the method of the run.
        components: name -> model to train.
        instance: the pictures of the subject.
        classes: the class pictures; empty without prior preservation.

    Attributes:
        planned: the memory plan by method, on the main process.
        planned_preparing, planned_training: the planned peaks in bytes beside what the process held before; on the main process.
        latents: the cached latents, if the run caches them.
        loss: the loss of the run.
        truncation: what truncation costs before any training, if the method truncates; on the main process.
        description: lines for the user.
        seconds: duration.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        base: DiffusionPipeline,
        accelerator: Accelerator,
        method: Method,
        components: Mapping[str, nn.Module],
        instance: list[Example],
        classes: list[Example],
    ):
        start = time.perf_counter()
        self.config, self.base, self.accelerator = config, base, accelerator
        self.method, self.components, self.instance, self.classes = method, components, instance, classes
        self.device, self.dtype = accelerator.device, PRECISIONS[accelerator.mixed_precision]
        is_main = accelerator.is_main_process
        self.planned = self._planned_memory() if is_main else {}
        uses = next(iter(self.planned.values()), None)
        self.planned_preparing = planned_preparing(config, base, method, components, uses, self.device, self.dtype) if uses else 0
        self.latents: LatentCache | None = self._cached_latents() if config.caches_latents else None
        self.loss = DreamBoothLoss(config, base, self.device, self._encoded_prompts())
        lines = self._change_models()
        self.description = [f"{caption_summary(instance, config)}; {self._encoded_when()}", *lines]
        self.planned_training = planned_training(config, base, components, self.device, self.dtype) if is_main else 0
        if is_main:
            self.description.append(memory_table(self.planned, config, self.dtype))
        self.seconds = time.perf_counter() - start

    def _encoded_when(self) -> str:
        latents, prompts = ("once" if cached else "at every step" for cached in (self.latents, self.loss.embeddings))
        return f"encoded {latents}, their prompts {prompts}"

    def _planned_memory(self) -> dict:
        pictures = self.config.train_batch_size * (2 if self.config.with_prior_preservation else 1)
        tokens = pipeline_tokens(self.base, pictures, self.config.resolution)
        return planned_memory(self.config, self.method, self.components, dtype=self.dtype, tokens=tokens)

    def _cached_latents(self) -> LatentCache:
        vae = self.base.vae.to(self.device)
        latents = cache_latents(self.instance, self.classes, self.config, vae, show_progress=self.accelerator.is_main_process)
        vae.to("cpu")
        return latents

    def _encoded_prompts(self) -> dict | None:
        """The cached embeddings of all prompts, if the run caches them."""
        if not self.config.caches_text_embeddings:
            return None
        text_encoders = [getattr(self.base, name) for name in self.config.family.text_encoders]
        for text_encoder in text_encoders:
            # In the dtype of the steps, so that an embedding is the same with the cache and without.
            text_encoder.to(self.device, self.dtype)
        prompts = [example.prompt for example in (*self.instance, *self.classes)]
        embeddings = cache_text_embeddings(prompts, self.config, self.base, show_progress=self.accelerator.is_main_process)
        for text_encoder in text_encoders:
            text_encoder.to("cpu")
        return embeddings

    def _change_models(self) -> list[str]:
        """Brings all models of a step to the device, the trained ones in the form of the method; returns lines about it."""
        config, is_main = self.config, self.accelerator.is_main_process
        measures_truncation = config.method == "cersa" and is_main
        if self.latents is None:
            self.base.vae.to(self.device)
        encoders = (
            {} if config.caches_text_embeddings else {name: getattr(self.base, name) for name in config.family.text_encoders}
        )
        for name, text_encoder in encoders.items():
            if name not in self.components:
                text_encoder.to(self.device, self.dtype)
        base_loss = self._loss_of_the_base(encoders) if measures_truncation else None
        # Seeded directly before the method draws its initial weights, so that these depend on the seed alone.
        set_seed(config.seed)
        self.method.plan(self.components, self.dtype, optimizer=optimizer_name(config))
        lines = [f"{name}: {self._change_model(name, model)}" for name, model in self.components.items()]
        share_bases(self.components)
        self.truncation = None
        if measures_truncation:
            self.truncation = TruncationCost.of(self.method.reports, base_loss, self._probe())
            lines.append(str(self.truncation))
        return lines

    def _loss_of_the_base(self, text_encoders: Mapping[str, nn.Module]) -> float:
        """The loss before any change, without the whole dense denoiser on the device."""
        for text_encoder in text_encoders.values():
            text_encoder.to(self.device)
        with run_from_cpu(self.loss.denoiser, self.device):
            return self._probe()

    def _probe(self) -> float:
        return probe_loss(self.loss, self.instance, self.components, self.accelerator.autocast(), self.latents)

    def _change_model(self, name: str, model: nn.Module) -> str:
        # The probe may have needed it on the device in dense form.
        description = self.method.prepare(name, model.to("cpu"), self.device, self.dtype)
        if self.dtype != torch.float32:
            self.method.cast_frozen(model, self.dtype)
        model.to(self.device)
        if self.config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return description
