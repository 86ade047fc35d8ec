"""Writing a checkpoint in factored form, tensor by tensor: later loads need no decomposition, and never the dense weights."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cersa_diffusion.compressed.folder import (
    DESCRIPTION_NAME,
    PIPELINE_INDEX,
    WEIGHTS_NAME,
    FactoredLayer,
    model_class,
    pipeline_entry,
    read_index,
    skeleton,
    stored_name,
    write_description,
)
from cersa_diffusion.compressed.tensors import TensorFileWriter, read_tensor, tensor_places
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.families.names import DENOISERS
from cersa_diffusion.files import NEITHER, flush, flush_tree, is_hub_id
from cersa_diffusion.functional import kept_energy
from cersa_diffusion.layers.model import check_untied, match_targets
from cersa_diffusion.memory.cost import is_profitable
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.fingerprint import SINGULAR_VALUES, base_entries

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did; ``str()`` is one line.

    Attributes:
        layers: "component.layer name" -> kept rank, of the layers that are factored.
        skipped: names of the target layers that were left dense (`unprofitable="skip"`).
        dense_bytes: of the weights of the components that hold them, before.
        stored_bytes: of the same components, after.
        seconds: time it took.
    """

    layers: dict[str, int]
    skipped: list[str]
    dense_bytes: int
    stored_bytes: int
    seconds: float

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} left dense" if self.skipped else ""
        return (
            f"{len(self.layers)} layers factored in {self.seconds:.1f} s{skipped}: "
            f"{self.dense_bytes / 1e6:.1f} MB -> {self.stored_bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class _Component:
    """One model to compress: where it is, what it is, and how."""

    name: str
    folder: Path
    library: str
    class_name: str
    config: CersaConfig


@dataclass(frozen=True)
class _Plan:
    """Where all tensors of a component are, and which of them are weights to decompose: layer name on disk -> shape."""

    component: _Component
    places: dict[str, Path]
    targets: dict[str, tuple[int, int]]


def compress(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    alpha: float | None = None,
    config: CersaConfig | Mapping[str, CersaConfig] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    show_progress: bool = True,
) -> CompressionReport:
    """Writes a checkpoint in factored form, which `cersa_diffusion.load_compressed` reads.

    Weights are read, decomposed and written tensor by tensor; a few layers (one for each worker thread) are in memory at a
    time. All or nothing: the folder appears when it is complete.

    Args:
        model: a diffusers pipeline folder, a folder of one diffusers or transformers model, or a model id on the hub; its
            weights as safetensors.
        output_dir: a folder that does not exist yet, or is empty.
        alpha: share of energy that is kept in all linear layers of the denoiser (or of the single model).
        config: settings instead, for the denoiser (or single model), or by component of a pipeline. What is trained later
            (beta, core, block) is not decided here.
        dtype: storage dtype of bases and other floating tensors of the compressed components; default: as the checkpoint has it.
            Singular values are float32.
        device: where to decompose; default: the CPU.
        revision: of a model on the hub.
        variant: of the weight files ("fp16").
        show_progress: show a bar with layer names and remaining time.

    Returns:
        Ranks and sizes.

    Raises:
        ConfigError: no such model, a setting that cannot be used, a target that shares its weight, or a folder that is in use.
        NonFiniteError: NaN or infinity in a weight.
    """
    start, output_dir = time.perf_counter(), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(f"output_dir {output_dir} is in use: name a folder that does not exist yet, or an empty one")
    source = _local(model, revision, variant)
    plans = [_plan(component, variant) for component in _components(source, _settings(alpha, config))]
    origin = {"name_or_path": str(model), "revision": revision, "variant": variant}
    layers, skipped = {}, []
    with _replaced_when_complete(output_dir) as folder:
        _copy_rest(source, folder, {plan.component.folder for plan in plans})
        for plan in plans:
            target = folder / plan.component.folder.relative_to(source)
            facts = _write_model(plan, target, dtype, device, show_progress)
            write_description(target, facts, plan.component.config.to_dict(), origin)
            label = f"{plan.component.name}." if plan.component.name else ""
            layers |= {label + name: own.k for name, own in facts.items()}
            skipped += [label + name for name in plan.targets if name not in facts]
        stored = sum((folder / plan.component.folder.relative_to(source) / WEIGHTS_NAME).stat().st_size for plan in plans)
    dense = sum(path.stat().st_size for plan in plans for path in set(plan.places.values()))
    return CompressionReport(layers, skipped, dense, stored, time.perf_counter() - start)


def _settings(alpha: float | None, config: CersaConfig | Mapping[str, CersaConfig] | None) -> dict[str | None, CersaConfig]:
    """By component; None stands for the denoiser or the single model."""
    if config is None:
        config = CersaConfig() if alpha is None else CersaConfig(alpha=alpha)
    elif alpha is not None:
        raise ConfigError(f"alpha = {alpha} and config both say what is kept: leave one of them out")
    settings = {None: config} if isinstance(config, CersaConfig) else dict(config)
    for name, own in settings.items():
        if own.residual != "drop" or own.memory_budget is not None:
            raise ConfigError(
                f"{name or 'config'}: residual={own.residual!r}, memory_budget={own.memory_budget!r}: "
                "compress drops the residual, and takes its ranks from alpha or rank"
            )
    return settings


def _components(source: Path, settings: dict[str | None, CersaConfig]) -> list[_Component]:
    if not (source / PIPELINE_INDEX).is_file():
        if list(settings) != [None]:
            raise ConfigError(f"{source}: a single model, and settings for the components {sorted(settings)}: give one config")
        return [_Component("", source, *model_class(source), settings[None])]
    index = read_index(source)
    components = []
    for name, config in settings.items():
        if name is None:
            name = next((name for name in DENOISERS if name in index), DENOISERS[0])
        components.append(_Component(name, source / name, *pipeline_entry(index, name, source), config))
    return components


def _plan(component: _Component, variant: str | None) -> _Plan:
    """Checks all that can be known before a weight is read."""
    if (component.folder / DESCRIPTION_NAME).is_file():
        raise ConfigError(f"{component.folder} is compressed already: start from the dense checkpoint")
    places = tensor_places(component.folder, variant)
    model = skeleton(component.folder, component.library, component.class_name)
    layers = match_targets(model, component.config.target_modules, component.config.exclude_modules)
    check_untied(model, layers)
    targets = {}
    for name, linear in layers.items():
        key = stored_name(f"{name}.weight", model, places)
        if key is None:
            raise ConfigError(f"{component.folder}: the checkpoint has no weight of layer {name}: add it to exclude_modules")
        targets[key.removesuffix(".weight")] = (linear.out_features, linear.in_features)
    return _Plan(component, places, targets)


def _write_model(
    plan: _Plan, folder: Path, dtype: torch.dtype | None, device: torch.device | str | None, show_progress: bool
) -> dict[str, FactoredLayer]:
    """Writes the weights of a component; returns what the description says of each factored layer."""
    writer, config, facts = TensorFileWriter(folder / WEIGHTS_NAME), plan.component.config, {}

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def job(name: str, shape: tuple[int, int]) -> LayerJob:
        label = f"{plan.component.name}.{name}" if plan.component.name else name
        path = plan.places[f"{name}.weight"]
        return LayerJob(label, shape, lambda: _read_weight(path, name, shape).to(device or "cpu"), config.kept_rank)

    with contextlib.closing(writer):
        for name, path in plan.places.items():
            if name.removesuffix(".weight") not in plan.targets or not name.endswith(".weight"):
                writer.add(name, converted(read_tensor(path, name)))
        with decompose_layers([job(*target) for target in plan.targets.items()], show_progress=show_progress) as decomposed:
            for (name, shape), (_, factors) in zip(plan.targets.items(), decomposed, strict=True):
                path, ranks = plan.places[f"{name}.weight"], config.layer_ranks(factors.s)
                weight = read_tensor(path, f"{name}.weight")
                if config.unprofitable == "skip" and not is_profitable(*shape, ranks, config):
                    writer.add(f"{name}.weight", converted(weight))
                    continue
                U, s, Vh = factors.U[:, : ranks.kept], factors.s[: ranks.kept].float(), factors.Vh[: ranks.kept]
                for part, tensor in (("U", U), ("Vh", Vh)):
                    writer.add(f"{name}.{part}", tensor.to(dtype or weight.dtype))
                writer.add(f"{name}.s", s)
                energy, leading = kept_energy(factors.s, ranks.kept), tuple(s[:SINGULAR_VALUES].tolist())
                facts[name] = FactoredLayer(*shape, ranks.kept, energy, leading, base_entries(weight))
        writer.finish()
    return facts


def _read_weight(path: Path, name: str, shape: tuple[int, int]) -> Tensor:
    weight = read_tensor(path, f"{name}.weight")
    if tuple(weight.shape) != shape or weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(
            f"{path}: layer {name} is {tuple(weight.shape)} of {weight.dtype}, expected {shape} of a floating dtype of at least "
            "16 bits: the checkpoint is quantised, or does not fit its config.json"
        )
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{path}: layer {name} holds NaN or infinity: this checkpoint is damaged")
    return weight


def _copy_rest(source: Path, folder: Path, compressed: set[Path]) -> None:
    """Copies everything but the dense weights of the compressed components, in whatever form."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        here = Path(directory)
        dense = here in compressed or here == source  # single-file checkpoints lie beside the components
        return [name for name in names if name.startswith(".") or (dense and _is_weights(here / name))]

    shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)


def _is_weights(path: Path) -> bool:
    return path.is_file() and (path.suffix in _WEIGHT_SUFFIXES or ".index." in path.name)


@contextlib.contextmanager
def _replaced_when_complete(output_dir: Path) -> Iterator[Path]:
    """A temporary folder that takes its name when the block ends well, and goes when it does not."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".{output_dir.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        flush_tree(temporary)
        os.replace(temporary, output_dir)
        flush(output_dir.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _local(model: str | os.PathLike, revision: str | None, variant: str | None) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if not is_hub_id(str(model)):
        raise ConfigError(f"{model}: {NEITHER}")
    # Imported here: only hub ids need it.
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(DiffusionPipeline.download(str(model), revision=revision, variant=variant, use_safetensors=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{model}: no such folder, and not to be had from the hub as a pipeline ({reason})") from error
