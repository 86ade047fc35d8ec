"""Full fine-tuning: the weights of the target layers, dense; the result is a whole pipeline or model."""

import torch

from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.methods.base import Method
from cersa_diffusion.pipelines.open import load_base


class FullMethod(Method):
    """The same layers dense; saved as a whole pipeline, as diffusers' train_dreambooth.py does."""

    frozen_in_compute_dtype = False
    needs_base = False
    opening = 'pipe = {pipeline}.from_pretrained("{path}")'

    def prepare(self, component, model):
        targets = self.targets[component]
        if targets is None:
            model.requires_grad_(True)
            return f"all parameters: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M trained"
        layers = match_targets(model, targets)
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        trained = sum(layer.weight.numel() for layer in layers.values())
        return f"{len(layers)} layers, dense weights: {trained / 1e6:.2f} M trained"

    def save(self, components, folder, origin, training):
        pipeline = load_base(origin.name_or_path, revision=origin.revision, variant=origin.variant)
        pipeline.register_modules(**components)
        pipeline.save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    @classmethod
    def open(cls, path, base, **options):
        # The result is a pipeline of its own: the base's revision says nothing about it.
        return load_base(str(path), dtype=options.get("dtype", torch.float32))

    def save_model(self, model, folder, head, origin, training):
        model.save_pretrained(folder)
        return folder / "model.safetensors"

    @classmethod
    def open_model(cls, model, folder):
        return model
