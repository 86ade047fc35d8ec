"""Full fine-tuning: the dense weights of the target layers are trained; the result is a complete pipeline or model."""

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.kinds import is_quantised
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.methods.base import Method
from cersa_diffusion.pipelines.open import load_base


class FullMethod(Method):
    """Trains the dense weights; the result is a complete pipeline, as with train_dreambooth.py of diffusers."""

    frozen_in_compute_dtype = False
    needs_base = False
    opening = 'pipe = {pipeline}.from_pretrained("{path}")'

    def prepare(self, component, model, device=None, dtype=None):
        targets = self.targets[component]
        trained = dict(model.named_modules()) if targets is None else match_targets(model, targets)
        quantised = next((name for name, layer in trained.items() if is_quantised(layer)), None)
        if quantised:
            raise ConfigError(
                f"layer {quantised} of {component} is quantised, and full fine-tuning cannot train it: load the base without "
                "quantisation, or train with method cersa or lora"
            )
        if targets is None:
            model.requires_grad_(True)
            return f"all parameters: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M trained"
        model.requires_grad_(False)
        numbers = sum(layer.weight.requires_grad_(True).numel() for layer in trained.values())
        return f"{len(trained)} layers, dense weights: {numbers / 1e6:.2f} M trained"

    def save(self, components, folder, origin, training):
        pipeline = load_base(origin.name_or_path, revision=origin.revision, variant=origin.variant)
        pipeline.register_modules(**components)
        pipeline.save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    @classmethod
    def open(cls, path, base, **options):
        # The result is a complete pipeline, so the revision of the base does not apply to it.
        return load_base(str(path), dtype=options.get("dtype", torch.float32))

    def save_model(self, model, folder, head, origin, training):
        model.save_pretrained(folder)
        return folder / "model.safetensors"

    @classmethod
    def open_model(cls, model, folder):
        return model
