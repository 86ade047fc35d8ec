"""The bases and runs that the page offers: those in the folders it was started with, and nothing else.

What a visitor sends is only ever looked up among the names listed here; it never becomes a part of a path.
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
# A runs folder, a folder of runs in it, a run.
DEPTH = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A base pipeline: the name that the page shows, and the folder or hub id that it is loaded from."""

    name: str
    source: str


@dataclass(frozen=True)
class Run:
    """A result that a column can draw with.

    Args:
        name: what the page shows, and what it is looked up by.
        method: a key of `METHODS`.
        weights_path: file or folder that `load_result` opens.
        base_name: of the base it belongs to; None: any, loading finds out.
        prompt: what it was trained on, if that is known.
        facts: of the training, from its result file.
    """

    name: str
    method: str
    weights_path: Path
    base_name: str | None
    prompt: str = ""
    facts: dict = field(default_factory=dict, compare=False)

    @property
    def has_strength(self) -> bool:
        """Whether a strength can be chosen: an adapter has one, a fully fine-tuned model has not."""
        return self.method != "full"

    @property
    def file_bytes(self) -> int:
        """Size on disk."""
        return self.facts.get("file_bytes") or self.weights_path.stat().st_size

    @property
    def training_bytes(self) -> int | None:
        """Weights, gradients and optimizer state while it was trained, if that is known."""
        parts = [self.facts.get(name) for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes")]
        return None if None in parts else sum(parts)


class Library:
    """What is in the folders, looked at anew whenever it is asked.

    Args:
        models_dirs: each a pipeline, or a folder of pipelines.
        runs_dirs: folders with results below them.
        bases: further bases by path or hub id.
    """

    def __init__(self, models_dirs: Iterable[Path], runs_dirs: Iterable[Path], bases: Iterable[str] = ()):
        self.models_dirs, self.runs_dirs, self.given = tuple(models_dirs), tuple(runs_dirs), tuple(bases)

    def bases(self) -> dict[str, Base]:
        """Name -> base."""
        found: dict[str, Base] = {}
        for folder in self.models_dirs:
            for path in (folder, *sorted(folder.glob("*/"))):
                if (path / PIPELINE_FILE).is_file() and _only_safetensors(path):
                    _add(found, path.resolve().name, str(path.resolve()))
        for source in self.given:
            _add(found, Path(source).resolve().name if os.path.isdir(source) else source, source)
        return found

    def base(self, name: str) -> Base:
        """The base of a name.

        Raises:
            ConfigError: there is none.
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
        """Name -> settings of the runs that have no result: with a checkpoint, to be resumed, or in training elsewhere."""
        found = {}
        for name, folder in self._folders(SETTINGS_FILE):
            if (folder / RESULT_FILE).exists() or not (list_checkpoints(folder) or training_process(folder)):
                continue
            try:
                found[name] = _read_config(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is not offered to be resumed: %s", folder, error)
        return found

    def _folders(self, marker: str) -> Iterator[tuple[str, Path]]:
        labels = _different([runs_dir.name for runs_dir in self.runs_dirs])
        for number, runs_dir in enumerate(self.runs_dirs):
            for depth in range(1, DEPTH + 1):
                for path in sorted(runs_dir.glob("/".join(["*"] * depth + [marker]))):
                    # A link that leads out of the folder is not in the folder.
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
        facts = json.loads((folder / RESULT_FILE).read_text())
        settings = read_settings(folder / SETTINGS_FILE)
        method, source = facts["method"], settings["pretrained_model_name_or_path"]
        # Not the recorded path: folders are moved, and a file's word is no reason to read elsewhere.
        weights = folder / _result_name(method)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not offered: %s", folder, error)
        return None
    usable = weights.exists() and weights.resolve().is_relative_to(folder.resolve()) and _only_safetensors(weights)
    if not usable or _identity(source) not in names:
        return None
    return Run(name, method, weights, names[_identity(source)], settings["instance_prompt"], facts)


def _result_name(method: str) -> str:
    if issubclass(METHODS[method], CersaMethod):
        return DEFAULT_FILE_NAME
    return LORA_FILE_NAME if issubclass(METHODS[method], LoraMethod) else "pipeline"


def _identity(source: str) -> str:
    return str(Path(source).resolve()) if os.path.isdir(source) else source


def _only_safetensors(path: Path) -> bool:
    """Whether nothing in a file or folder would be opened as a pickle."""
    pickles = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
    return path.suffix not in pickles and not any(file.suffix in pickles for file in path.glob("*/*"))


def _different(names: list[str]) -> list[str]:
    """The names, those that came before with a number."""
    return [f"{name} {names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def _add(found: dict[str, Base], name: str, source: str) -> None:
    if any(base.source == source for base in found.values()):
        return
    unique = next(each for each in (name, *(f"{name} ({number})" for number in range(2, 1000))) if each not in found)
    found[unique] = Base(unique, source)
