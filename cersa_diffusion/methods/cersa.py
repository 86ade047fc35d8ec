"""CERSA, and SVFit and SVFT as settings of it: cores in the basis of every target layer's weight."""

from collections.abc import Mapping
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
from cersa_diffusion.methods.base import BASE_LINE, Method, Origin, head_state
from cersa_diffusion.pipelines.methods import load_cersa_weights
from cersa_diffusion.pipelines.open import load_base

HEAD_FILE = "head.safetensors"


class CersaMethod(Method):
    """Cores in the basis of every target layer's weight.

    Attributes:
        reports: component -> what the injection did.
    """

    opening = BASE_LINE + '\npipe.load_cersa_weights("{path}")'

    def __init__(self, settings, targets):
        super().__init__(settings, targets)
        self.reports: dict[str, InjectionReport] = {}
        self._ranks: dict[str, dict[str, LayerRanks | None]] = {}

    def config(self, component: str) -> CersaConfig:
        """The settings of the injection into a component."""
        return self.settings.cersa_config(self.targets[component])

    def plan(self, components, dtype, *, optimizer="adamw", also_trained=()):
        if self.settings.memory_budget is not None:
            configs = {name: self.config(name) for name in components}
            options = {"weight_dtype": dtype, "optimizer": optimizer, "also_trained": also_trained}
            self._ranks = choose_ranks(components, configs, **options)

    def prepare(self, component, model):
        report = inject_cersa(model, self.config(component), ranks=self._ranks.get(component))
        self.reports[component] = report
        return str(report)

    def save(self, components, folder, origin, training):
        return self._write(components, folder, origin, training)

    @classmethod
    def open(cls, path, base, **options):
        pipeline = load_base(base, **options)
        load_cersa_weights(pipeline, path)
        return pipeline

    def save_model(self, model, folder, head, origin, training):
        (component,) = self.targets
        (folder / HEAD_FILE).write_bytes(safetensors_bytes(head_state(model, head), {"format": "pt"}))
        return self._write({component: model}, folder, origin, training)

    @classmethod
    def open_model(cls, model, folder):
        load_adapter(model, folder / DEFAULT_FILE_NAME, keep_base=False)
        load_head(model, folder / HEAD_FILE)
        return model

    def _write(self, components: Mapping[str, nn.Module], folder: Path, origin: Origin, training: dict) -> Path:
        path = folder / DEFAULT_FILE_NAME
        config = {name: self.config(name).to_dict() for name in components}
        save_adapter(components, path, config=config, base_model=origin.to_dict(), training=training)
        return path


def load_head(model: nn.Module, path: Path) -> None:
    """Puts the saved weights of a classifier in a model of the same classes.

    Args:
        model: changed in place, in the dtype that it has.
        path: of the weights.

    Raises:
        ConfigError: no such file, or the model's classifier is another one; the model is left as it is.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file, expected the weights of a classifier")
    head: dict[str, Tensor] = load_file(path)
    present = model.state_dict()
    wrong = [name for name, tensor in head.items() if name not in present or present[name].shape != tensor.shape]
    if wrong:
        raise ConfigError(
            f"{path}: {wrong[0]} of shape {tuple(head[wrong[0]].shape)} does not fit this model: load the base with as many "
            "labels as the classifier was trained for"
        )
    model.load_state_dict(head, strict=False)
