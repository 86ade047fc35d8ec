"""CERSA, and SVFit and SVFT as special settings: cores in the singular basis of the weight of every target layer."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.adapters.save import save_adapter
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import safetensors_bytes
from cersa_diffusion.inject import InjectionReport, inject_cersa
from cersa_diffusion.memory.plan import choose_ranks
from cersa_diffusion.methods.base import BASE_LINE, Method, head_state
from cersa_diffusion.pipelines.methods import load_cersa_weights
from cersa_diffusion.pipelines.open import load_base

HEAD_FILE = "head.safetensors"


class CersaMethod(Method):
    """Cores in the singular basis of the weight of every target layer.

    Attributes:
        reports: component -> report of the injection.
    """

    opening = BASE_LINE + '\npipe.load_cersa_weights("{path}")'

    def __init__(self, settings, targets):
        super().__init__(settings, targets)
        self.reports: dict[str, InjectionReport] = {}
        self._ranks: dict[str, dict[str, LayerRanks | None]] = {}

    def config(self, component: str) -> CersaConfig:
        """The settings for the injection into a component."""
        return self.settings.cersa_config(self.targets[component])

    def plan(self, components, dtype, *, optimizer="adamw", also_trained=()):
        if self.settings.memory_budget is not None:
            configs = {name: self.config(name) for name in components}
            self._ranks = choose_ranks(components, configs, weight_dtype=dtype, optimizer=optimizer, also_trained=also_trained)

    def prepare(self, component, model, device=None, dtype=None):
        report = inject_cersa(model, self.config(component), ranks=self._ranks.get(component), device=device, dtype=dtype)
        self.reports[component] = report
        return str(report)

    def save(self, components, folder, origin, training):
        path = folder / DEFAULT_FILE_NAME
        config = {name: self.config(name).to_dict() for name in components}
        save_adapter(components, path, config=config, base_model=origin.to_dict(), training=training)
        return path

    @classmethod
    def open(cls, path, base, **options):
        pipeline = load_base(base, **options)
        load_cersa_weights(pipeline, path)
        return pipeline

    def save_model(self, model, folder, head, origin, training):
        (component,) = self.targets
        (folder / HEAD_FILE).write_bytes(safetensors_bytes(head_state(model, head), {"format": "pt"}))
        return self.save({component: model}, folder, origin, training)

    @classmethod
    def open_model(cls, model, folder):
        load_adapter(model, folder / DEFAULT_FILE_NAME, keep_base=False)
        load_head(model, folder / HEAD_FILE)
        return model


def load_head(model: nn.Module, path: Path) -> None:
    """Loads saved weights of a classifier into a model with the same classes; the dtype of the model stays.

    Raises:
        ConfigError: the file does not exist, or does not fit the classifier of the model; the model is not changed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file, expected the weights of a classifier")
    head: dict[str, Tensor] = load_file(path)
    present = model.state_dict()
    wrong = [name for name, tensor in head.items() if name not in present or present[name].shape != tensor.shape]
    if wrong:
        raise ConfigError(
            f"{path}: {wrong[0]} of shape {tuple(head[wrong[0]].shape)} does not fit this model: load the base with the number "
            "of labels that the classifier was trained for"
        )
    model.load_state_dict(head, strict=False)
