"""Writes a checkpoint in factored form, tensor by tensor: to load it, neither a decomposition nor dense weights are needed."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cersa_diffusion.compressed.folder import (
    DESCRIPTION_NAME,
    PIPELINE_INDEX,
    WEIGHTS_NAME,
    FactoredLayer,
    local_folder,
    model_class,
    pipeline_entry,
    read_index,
    skeleton,
    stored_name,
    write_description,
)
from cersa_diffusion.compressed.tensors import TensorFileWriter, read_tensor, tensor_places
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.families.names import DENOISERS
from cersa_diffusion.files import flush, flush_tree
from cersa_diffusion.functional import kept_energy
from cersa_diffusion.layers.blocks import Group, block_groups, share_ranks
from cersa_diffusion.layers.model import DECOMPOSABLE, check_untied, match_targets
from cersa_diffusion.memory.cost import is_profitable
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.fingerprint import SINGULAR_VALUES, base_entries
from cersa_diffusion.weights.stored import FinestWeight

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}


@dataclass(frozen=True)
class CompressionReport:
    """The result of `compress`; ``str()`` is one line.

    Attributes:
        layers: "component.layer name" -> kept rank, for the factored layers.
        skipped: names of the target layers that stay dense (`unprofitable="skip"`).
        dense_bytes, stored_bytes: size of the weight files of the compressed components, before and after.
        seconds: duration.
    """

    layers: dict[str, int]
    skipped: list[str]
    dense_bytes: int
    stored_bytes: int
    seconds: float

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} layers stay dense" if self.skipped else ""
        return (
            f"{len(self.layers)} layers factored in {self.seconds:.1f} s{skipped}: "
            f"{self.dense_bytes / 1e6:.1f} MB -> {self.stored_bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class _Component:
    """One model to compress, and the settings for it."""

    name: str
    folder: Path
    library: str
    class_name: str
    config: CersaConfig


@dataclass(frozen=True)
class _Plan:
    """The files of all tensors of a component, and the weights to decompose: layer name in the checkpoint -> shape.

    `groups`: layer name in the checkpoint -> group of layers that share their ranks, with `uniform_blocks`.
    """

    component: _Component
    files: dict[str, Path]
    targets: dict[str, tuple[int, int]]
    groups: dict[str, Group]

    def label(self, name: str) -> str:
        """The name of a layer in messages and in the report."""
        return f"{self.component.name}.{name}" if self.component.name else name


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

    Weights are read, decomposed and written tensor by tensor; only a few layers (one per worker thread) are in memory at the
    same time. The folder appears only when it is complete.

    Args:
        model: a diffusers pipeline folder, a folder of one diffusers or transformers model, or a model id on the hub, with
            safetensors weights.
        output_dir: a folder that does not exist yet or is empty.
        alpha: share of energy that is kept in all linear layers of the denoiser (or of the single model).
        config: settings in the place of `alpha`, for the denoiser (or the single model), or by component of a pipeline. The
            settings of later training (beta, core, block) have no effect here.
        dtype: storage dtype of bases and other floating-point tensors of the compressed components; default: the dtype in the
            checkpoint. Singular values are float32.
        device: device of the decomposition; default: the accelerator, if there is one that has float64, else the CPU.
        revision: revision of a model on the hub.
        variant: variant of the weight files ("fp16").
        show_progress: show a bar with layer names and remaining time.

    Raises:
        ConfigError: no such model, a setting cannot be used, a target layer shares its weight, or `output_dir` is in use.
        NonFiniteError: NaN or infinity in a weight.
    """
    start, output_dir = time.perf_counter(), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(f"output_dir {output_dir} is in use: choose a folder that does not exist yet or is empty")
    source = local_folder(model, revision, pipeline_options={"variant": variant, "use_safetensors": True})
    plans = [_plan(component, variant) for component in _components(source, _settings(alpha, config))]
    origin = {"name_or_path": str(model), "revision": revision, "variant": variant}
    layers, skipped, solver = {}, [], None if device is None else torch.device(device)
    with _replaced_when_complete(output_dir) as folder:
        _copy_rest(source, folder, {plan.component.folder for plan in plans})
        for plan in plans:
            target = folder / plan.component.folder.relative_to(source)
            factored = _write_model(plan, target, dtype, solver, show_progress)
            write_description(target, factored, plan.component.config.to_dict(), origin)
            layers |= {plan.label(name): layer.k for name, layer in factored.items()}
            skipped += [plan.label(name) for name in plan.targets if name not in factored]
        stored = sum((folder / plan.component.folder.relative_to(source) / WEIGHTS_NAME).stat().st_size for plan in plans)
    dense = sum(path.stat().st_size for plan in plans for path in set(plan.files.values()))
    return CompressionReport(layers, skipped, dense, stored, time.perf_counter() - start)


def _settings(alpha: float | None, config: CersaConfig | Mapping[str, CersaConfig] | None) -> dict[str | None, CersaConfig]:
    """Component -> settings; None stands for the denoiser or the single model."""
    if config is None:
        config = CersaConfig() if alpha is None else CersaConfig(alpha=alpha)
    elif alpha is not None:
        raise ConfigError(f"alpha = {alpha} and config both decide what is kept: leave one of them out")
    settings = {None: config} if isinstance(config, CersaConfig) else dict(config)
    for name, component_config in settings.items():
        residual, memory_budget = component_config.residual, component_config.memory_budget
        if residual != "drop" or memory_budget is not None:
            raise ConfigError(
                f"{name or 'config'}: {residual=}, {memory_budget=}, expected 'drop' and None: compress drops the residual, "
                "and takes the ranks from alpha or rank"
            )
    return settings


def _components(source: Path, settings: dict[str | None, CersaConfig]) -> list[_Component]:
    if not (source / PIPELINE_INDEX).is_file():
        if list(settings) != [None]:
            raise ConfigError(f"{source} is a single model, but config has components {sorted(settings)}: pass one CersaConfig")
        return [_Component("", source, *model_class(source), settings[None])]
    index = read_index(source)
    components = []
    for name, config in settings.items():
        if name is None:
            name = next((name for name in DENOISERS if name in index), DENOISERS[0])
        components.append(_Component(name, source / name, *pipeline_entry(index, name, source), config))
    return components


def _plan(component: _Component, variant: str | None) -> _Plan:
    """Makes all checks that are possible before a weight is read."""
    if (component.folder / DESCRIPTION_NAME).is_file():
        raise ConfigError(f"{component.folder} is compressed already: start from the dense checkpoint")
    files = tensor_places(component.folder, variant)
    model = skeleton(component.folder, component.library, component.class_name)
    layers = match_targets(model, component.config.target_modules, component.config.exclude_modules)
    check_untied(model, layers)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in layers.items()}
    group_of = block_groups(model, shapes) if component.config.needs_all_layers else {}
    targets, groups = {}, {}
    for name, shape in shapes.items():
        key = stored_name(f"{name}.weight", model, files)
        if key is None:
            raise ConfigError(f"{component.folder}: the checkpoint has no weight of layer {name}: add it to exclude_modules")
        targets[key.removesuffix(".weight")] = shape
        if group_of:
            groups[key.removesuffix(".weight")] = group_of[name]
    return _Plan(component, files, targets, groups)


def _jobs(plan: _Plan, choose_rank: Callable[[str, Tensor], int], **options) -> list[LayerJob]:
    """The jobs for the weights of a component; `choose_rank` takes the name of a layer in the checkpoint and its spectrum."""

    def job(name: str, shape: tuple[int, int]) -> LayerJob:
        path = plan.files[f"{name}.weight"]
        load = partial(_read_weight, path, name, shape)
        return LayerJob(plan.label(name), shape, lambda: FinestWeight(load()), partial(choose_rank, name), **options)

    return [job(*target) for target in plan.targets.items()]


def _shared_ranks(plan: _Plan, device: torch.device | None, show_progress: bool) -> dict[str, LayerRanks]:
    """Layer name in the checkpoint -> ranks, where layers share them; the cache keeps the factors."""
    jobs = _jobs(plan, lambda name, s: len(s), build=lambda weight, factors: factors.s)
    with decompose_layers(jobs, device=device, show_progress=show_progress) as spectra:
        own = {name: plan.component.config.layer_ranks(s) for name, (_, s) in zip(plan.targets, spectra, strict=True)}
    return share_ranks(own, plan.groups)


def _write_model(
    plan: _Plan, folder: Path, dtype: torch.dtype | None, device: torch.device | None, show_progress: bool
) -> dict[str, FactoredLayer]:
    """Writes the weights of a component; returns the entries of the factored layers for the description."""
    shared = _shared_ranks(plan, device, show_progress) if plan.groups else {}
    writer, config, factored = TensorFileWriter(folder / WEIGHTS_NAME), plan.component.config, {}

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def ranks_of(name: str, singular_values: Tensor) -> LayerRanks:
        return shared.get(name) or config.layer_ranks(singular_values)

    with contextlib.closing(writer):
        for name, path in plan.files.items():
            if name.removesuffix(".weight") not in plan.targets or not name.endswith(".weight"):
                writer.add(name, converted(read_tensor(path, name)))
        jobs = _jobs(plan, lambda name, s: ranks_of(name, s).kept)
        with decompose_layers(jobs, device=device, show_progress=show_progress) as decomposed:
            for (name, shape), (_, factors) in zip(plan.targets.items(), decomposed, strict=True):
                path, ranks = plan.files[f"{name}.weight"], ranks_of(name, factors.s)
                weight = read_tensor(path, f"{name}.weight")
                if config.unprofitable == "skip" and not is_profitable(*shape, ranks, config):
                    writer.add(f"{name}.weight", converted(weight))
                    continue
                U, s, Vh = factors.U[:, : ranks.kept], factors.s[: ranks.kept].float(), factors.Vh[: ranks.kept]
                for part, tensor in (("U", U), ("Vh", Vh)):
                    writer.add(f"{name}.{part}", tensor.to(dtype or weight.dtype))
                writer.add(f"{name}.s", s)
                energy, leading = kept_energy(factors.s, ranks.kept), tuple(s[:SINGULAR_VALUES].tolist())
                factored[name] = FactoredLayer(*shape, ranks.kept, energy, leading, base_entries(weight))
        writer.finish()
    return factored


def _read_weight(path: Path, name: str, shape: tuple[int, int]) -> Tensor:
    weight = read_tensor(path, f"{name}.weight")
    if tuple(weight.shape) != shape or weight.dtype not in DECOMPOSABLE:
        raise ConfigError(
            f"{path}: layer {name} has shape {tuple(weight.shape)} and dtype {weight.dtype}, expected {shape} and a "
            "floating-point dtype of at least 16 bits: the checkpoint is quantised or does not match its config.json"
        )
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{path}: layer {name} holds NaN or infinity: this checkpoint is damaged")
    return weight


def _copy_rest(source: Path, folder: Path, compressed: set[Path]) -> None:
    """Copies everything except the dense weights, in any format, of the compressed components."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        here = Path(directory)
        dense = here in compressed or here == source  # single-file checkpoints are in the folder of the pipeline
        return [name for name in names if name.startswith(".") or (dense and _is_weights(here / name))]

    shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)


def _is_weights(path: Path) -> bool:
    return path.is_file() and (path.suffix in _WEIGHT_SUFFIXES or ".index." in path.name)


@contextlib.contextmanager
def _replaced_when_complete(output_dir: Path) -> Iterator[Path]:
    """Yields a temporary folder: it is renamed to `output_dir` when the block ends, and removed when the block fails."""
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
