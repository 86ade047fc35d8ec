"""The bases and runs that the page offers: only those in the folders that were given at its start.

A name that a visitor sends is only looked up among the names listed here; it never becomes a part of a path.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.methods.lora import LoraMethod
from cersa_diffusion.methods.lora_files import LORA_FILE_NAME
from cersa_diffusion.methods.table import METHODS
from cersa_diffusion.training import DreamBoothConfig, DreamBoothXLConfig
from cersa_diffusion.training.checkpoints.folder import list_checkpoints
from cersa_diffusion.training.run.lock import training_process
from cersa_diffusion.training.run.result import RESULT_FILE
from cersa_diffusion.training.settings.file import SETTINGS_FILE, read_settings

PIPELINE_FILE = "model_index.json"
# A run lies in the runs folder or in a folder of the runs folder.
DEPTH = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A base pipeline: the name that the page shows, and the folder or hub id that it is loaded from."""

    name: str
    source: str


@dataclass(frozen=True)
class Run:
    """A finished training whose result can be a column.

    Args:
        name: name in the page and for look-ups.
        method: a key of `METHODS`.
        weights_path: file or folder for `load_result`.
        base_name: name of its base; None if only loading can show whether it fits a base.
        prompt: prompt of the training, if it is known.
        revision, variant: of the base that it was trained on.
        facts: content of the result file of the training.
    """

    name: str
    method: str
    weights_path: Path
    base_name: str | None
    prompt: str = ""
    revision: str | None = None
    variant: str | None = None
    facts: dict = field(default_factory=dict, compare=False)

    @property
    def has_strength(self) -> bool:
        """Whether a strength can be chosen: an adapter has a strength, a fully fine-tuned model does not."""
        return self.method != "full"

    @property
    def file_bytes(self) -> int:
        """Size on disk."""
        return self.facts.get("file_bytes") or self.weights_path.stat().st_size

    @property
    def training_bytes(self) -> int | None:
        """Bytes of weights, gradients and optimizer state in the training, if they are known."""
        sizes = [self.facts.get(name) for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes")]
        return None if None in sizes else sum(sizes)


class Library:
    """The content of the folders, which is read again at every call.

    Args:
        models_dirs: folders that are a pipeline or contain pipelines.
        runs_dirs: folders that contain results.
        bases: further bases by path or hub id.
    """

    def __init__(self, models_dirs: Iterable[Path], runs_dirs: Iterable[Path], bases: Iterable[str] = ()):
        self.models_dirs, self.runs_dirs, self.given = tuple(models_dirs), tuple(runs_dirs), tuple(bases)

    def bases(self) -> dict[str, Base]:
        """Name -> base."""
        bases: dict[str, Base] = {}
        for folder in self.models_dirs:
            for path in (folder, *sorted(folder.glob("*/"))):
                if (path / PIPELINE_FILE).is_file() and _only_safetensors(path):
                    _add_base(bases, path.resolve().name, str(path.resolve()))
        for source in self.given:
            _add_base(bases, Path(source).resolve().name if os.path.isdir(source) else source, source)
        return bases

    def base(self, name: str) -> Base:
        """The base with this name.

        Raises:
            ConfigError: there is no such base.
        """
        bases = self.bases()
        if name not in bases:
            raise ConfigError(f"no base named {str(name)!r}: choose one of {', '.join(bases) or 'none'}")
        return bases[name]

    def runs(self) -> dict[str, Run]:
        """Name -> finished run."""
        names = {_identity(base.source): base.name for base in self.bases().values()}
        runs = {}
        for name, folder in self._folders(RESULT_FILE):
            run = _read_run(name, folder, names)
            if run is not None:
                runs[name] = run
        return runs

    def unfinished(self) -> dict[str, DreamBoothConfig]:
        """Name -> settings of the runs without a result that have a checkpoint or are trained by another process."""
        configs = {}
        for name, folder in self._folders(SETTINGS_FILE):
            if (folder / RESULT_FILE).exists() or not (list_checkpoints(folder) or training_process(folder)):
                continue
            try:
                configs[name] = _read_config(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s cannot be resumed: %s", folder, error)
        return configs

    def _folders(self, marker: str) -> Iterator[tuple[str, Path]]:
        labels = _unique_names([runs_dir.name for runs_dir in self.runs_dirs])
        for number, runs_dir in enumerate(self.runs_dirs):
            for depth in range(1, DEPTH + 1):
                for path in sorted(runs_dir.glob("/".join(["*"] * depth + [marker]))):
                    # The target of a link has to be in the folder, too.
                    if path.resolve().is_relative_to(runs_dir.resolve()):
                        name = path.parent.relative_to(runs_dir).as_posix()
                        yield (f"{labels[number]}: {name}" if number else name), path.parent


def _read_config(folder: Path) -> DreamBoothConfig:
    settings = read_settings(folder / SETTINGS_FILE, DreamBoothXLConfig) | {"output_dir": str(folder)}
    index = Path(settings["pretrained_model_name_or_path"]) / PIPELINE_FILE
    sdxl = index.is_file() and json.loads(index.read_text()).get("_class_name") == "StableDiffusionXLPipeline"
    return (DreamBoothXLConfig if sdxl else DreamBoothConfig)(**settings)


def _read_run(name: str, folder: Path, names: dict[str, str]) -> Run | None:
    try:
        result = json.loads((folder / RESULT_FILE).read_text())
        settings = read_settings(folder / SETTINGS_FILE)
        method, source = result["method"], settings["pretrained_model_name_or_path"]
        # The recorded path is not used: folders may be moved, and a file must not make the server read in other folders.
        weights = folder / _result_name(method)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be a column: %s", folder, error)
        return None
    usable = weights.exists() and weights.resolve().is_relative_to(folder.resolve()) and _only_safetensors(weights)
    if not usable or _identity(source) not in names:
        return None
    origin = {name: settings.get(name) for name in ("revision", "variant")}
    return Run(name, method, weights, names[_identity(source)], settings["instance_prompt"], facts=result, **origin)


def _result_name(method: str) -> str:
    if issubclass(METHODS[method], CersaMethod):
        return DEFAULT_FILE_NAME
    return LORA_FILE_NAME if issubclass(METHODS[method], LoraMethod) else "pipeline"


def _identity(source: str) -> str:
    return str(Path(source).resolve()) if os.path.isdir(source) else source


def _only_safetensors(path: Path) -> bool:
    """Whether no file would be opened as a pickle."""
    pickles = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
    return path.suffix not in pickles and not any(file.suffix in pickles for file in path.glob("*/*"))


def _unique_names(names: list[str]) -> list[str]:
    """The names, with a number added to every repeated name."""
    return [f"{name} {names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def _add_base(bases: dict[str, Base], name: str, source: str) -> None:
    if any(base.source == source for base in bases.values()):
        return
    candidates = (name, *(f"{name} ({number})" for number in range(2, 1000)))
    unique = next(candidate for candidate in candidates if candidate not in bases)
    bases[unique] = Base(unique, source)
