"""The ablations of the paper's Tables 2 to 6 on any classification task, as one sweep that goes on where it was interrupted."""

import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cersa_diffusion.analysis.kinds import targets_by_component
from cersa_diffusion.analysis.models import open_dense, read_json
from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.classification import ClassifierSettings, ImageData, RunArguments, TextData, TrainReport, train_classifier
from cersa_diffusion.classification.run import METRICS_FILE
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.memory.cost import DenseLayer, cersa_memory
from cersa_diffusion.memory.plan import MemoryPlan, plan_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEEP_FILE = "sweep.json"
# Of the paper's Table 3, whose r1 = r2 is not given: beta = .8 trains about half of what alpha = .95 keeps.
BLOCK_BETA = 0.8


@dataclass(frozen=True)
class Variant:
    """A row of one of the tables.

    Attributes:
        table: its number in the paper.
        title: what the table calls it.
        changes: fields of `ClassifierSettings` that differ from the run's own.
    """

    table: int
    title: str
    changes: Mapping[str, object]


def _table_2() -> list[Variant]:
    kinds = {"QV": "Q, V", "QKV": "Q, K, V", "QKVP": "Q, K, V, P", "all": "Q, K, V, P, UP, DN"}
    return [Variant(2, title, {"alpha": 0.95, "target_modules": [preset]}) for preset, title in kinds.items()]


def _table_3() -> list[Variant]:
    return [
        Variant(3, title, {"alpha": 0.95, "beta": BLOCK_BETA, "block": block})
        for block, title in (("top", "top r1"), ("bottom", "bottom r2"))
    ]


def _table_4() -> list[Variant]:
    equal = [Variant(4, f"alpha = beta = {alpha:g}", {"alpha": alpha}) for alpha in (1.0, 0.95, 0.9, 0.8, 0.5)]
    return equal + [Variant(4, f"alpha = .95, beta = {beta:g}", {"alpha": 0.95, "beta": beta}) for beta in (0.9, 0.8, 0.5)]


def _table_5(rank: int) -> list[Variant]:
    return [
        Variant(5, "layer-wise, alpha = .9", {"alpha": 0.9}),
        Variant(5, f"uniform, r = {rank}", {"uniform_rank": rank}),
    ]


def _table_6() -> list[Variant]:
    return [
        Variant(6, "matrix", {"alpha": 0.9}),
        Variant(6, "array", {"alpha": 0.9, "core": "diagonal"}),
    ]


TABLES = (2, 3, 4, 5, 6)


def variants(settings: ClassifierSettings, tables: Sequence[int] = TABLES) -> list[Variant]:
    """The rows of some of the tables; the uniform rank of Table 5 is the one that costs what alpha = .9 does.

    Args:
        settings: of the run; model and targets decide the uniform rank.
        tables: numbers of the paper's tables, 2 to 6.

    Raises:
        ConfigError: another table, or a model that cannot be loaded or decomposed.
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown or not tables:
        raise ConfigError(f"tables: {unknown or 'none'} of the ablations, expected some of {', '.join(map(str, TABLES))}")
    rows = {2: _table_2, 3: _table_3, 4: _table_4, 6: _table_6}
    rows[5] = lambda: _table_5(_uniform_rank(settings))
    return [variant for table in sorted(set(tables)) for variant in rows[table]()]


def _uniform_rank(settings: ClassifierSettings) -> int:
    components = open_dense(settings.model_name_or_path, settings.revision)
    targets = targets_by_component(components, settings.target_modules, "QKV")["model"]
    return uniform_rank(plan_memory(components, CersaConfig(alpha=0.9, target_modules=targets)))


def uniform_rank(plan: MemoryPlan) -> int:
    """The largest rank that, kept and trained in every layer alike, takes no more memory than the ranks of a plan (Table 5).

    Args:
        plan: of a CERSA with a matrix as its core.

    Returns:
        At least 1; a layer that is smaller counts with all it has.
    """
    config = CersaConfig(unprofitable="factor")

    def total(ranks: Sequence[LayerRanks]) -> int:
        return sum(
            cersa_memory(DenseLayer(layer.out_features, layer.in_features, False, torch.float32), own, config).total
            for layer, own in zip(plan.layers, ranks, strict=True)
        )

    full = [min(layer.out_features, layer.in_features) for layer in plan.layers]
    most = total([LayerRanks(layer.kept_rank, layer.core_rank) for layer in plan.layers])
    rank = 1
    while rank < max(full) and total([LayerRanks(min(rank + 1, own), min(rank + 1, own)) for own in full]) <= most:
        rank += 1
    return rank


def run_ablations(
    settings: ClassifierSettings,
    data: ImageData | TextData,
    arguments: RunArguments,
    *,
    tables: Sequence[int] = TABLES,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
) -> list[dict]:
    """Trains every variant with every seed, each distinct setting once.

    Runs are kept in `output_dir/runs`; those that are finished are read instead of repeated, and one that was interrupted goes on
    from its last checkpoint. A run takes the settings as they are given but for what the variant changes; the method is CERSA.

    Args:
        settings: model and method.
        data: where the examples come from.
        arguments: of the Trainer; `output_dir` is the folder of the sweep.
        tables: numbers of the paper's tables, 2 to 6.
        seeds: of the runs.
        preset: name of the hyper-parameters, for the reports.

    Returns:
        A row for every variant and seed.

    Raises:
        ConfigError: no seeds, an unknown table, a folder with a sweep of other settings, or what `train_classifier` refuses.
    """
    if not seeds:
        raise ConfigError("seeds: none are given, expected at least one")
    chosen = variants(settings, tables)
    base = replace(settings, method="cersa")
    by_variant = [(variant, replace(base, **variant.changes)) for variant in chosen]
    folder = Path(arguments.output_dir)
    _note_settings(folder, settings, data, arguments)
    rows = []
    for variant, own in by_variant:
        for seed in dict.fromkeys(seeds):
            report = _train(own, data, arguments, folder / "runs" / _name(base, own) / f"seed-{seed}", seed, preset)
            memory = report.weight_bytes + report.gradient_bytes + report.optimizer_bytes
            place = {"table": variant.table, "variant": variant.title, "data": report.data, "metric": report.metric, "seed": seed}
            cost = {"trained": report.trainable_parameters, "memory": memory, "seconds": report.seconds}
            rows.append(place | {"score": report.score, "loss": report.loss} | cost)
    return rows


def _name(base: ClassifierSettings, own: ClassifierSettings) -> str:
    """A name for the runs of a variant, the same for equal settings: tables share them."""
    values = [asdict(settings) | {"target_modules": settings.target_modules or ["QKV"]} for settings in (base, own)]
    changed = {name: value for name, value in values[1].items() if value != values[0][name]}
    parts = [f"{name}-{'+'.join(value) if isinstance(value, list) else value}" for name, value in sorted(changed.items())]
    return "_".join(parts) or "as-given"


def _train(
    settings: ClassifierSettings,
    data: ImageData | TextData,
    arguments: RunArguments,
    folder: Path,
    seed: int,
    preset: str | None,
) -> TrainReport:
    if (folder / METRICS_FILE).is_file():
        return TrainReport(**read_json(folder / METRICS_FILE))
    own = copy.copy(arguments)
    own.output_dir, own.seed = str(folder), seed
    # In a fresh folder this starts from the beginning.
    own.resume_from_checkpoint = "latest"
    return train_classifier(settings, data, own, preset)


def _note_settings(folder: Path, settings: ClassifierSettings, data: ImageData | TextData, arguments: RunArguments) -> None:
    """Writes what all runs have in common, and refuses a folder whose runs had something else."""
    changed = ("output_dir", "logging_dir", "run_name", "seed", "data_seed", "resume_from_checkpoint")
    common = {name: value for name, value in arguments.to_dict().items() if name not in changed}
    now = json.loads(json.dumps({**asdict(settings), **asdict(data), **common}, default=str))
    path = folder / SWEEP_FILE
    if path.is_file():
        before = read_json(path)
        differing = sorted(name for name in now if before.get(name) != now[name])
        if differing:
            raise ConfigError(f"{folder} holds a sweep with other settings of {', '.join(differing)}: choose another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n")


def summary_rows(rows: Sequence[Mapping]) -> list[dict]:
    """A row for every variant: mean and standard deviation of the score over the seeds, memory and trained numbers."""
    summary = []
    for table, title in dict.fromkeys((row["table"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["table"], row["variant"]) == (table, title)]
        scores = [row["score"] for row in own]
        figures = {
            "seeds": len(own),
            "mean": statistics.fmean(scores),
            "deviation": statistics.stdev(scores) if len(own) > 1 else None,
        }
        cost = {name: own[0][name] for name in ("trained", "memory")}
        summary.append({"table": table, "variant": title, "metric": own[0]["metric"]} | figures | cost)
    return summary


def draw_ablations(rows: Sequence[Mapping]) -> "Figure":
    """A panel for every table: the score of every variant, a dot for every seed, with the memory of its training."""
    tables, summary = sorted({row["table"] for row in rows}), summary_rows(rows)
    heights = [1 + sum(row["table"] == table for row in summary) for table in tables]
    figure = new_figure(9, 0.5 + 0.42 * sum(heights))
    panels = figure.subplots(len(tables), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        own = [row for row in summary if row["table"] == table]
        for number, row in enumerate(own):
            dots = [each["score"] for each in rows if (each["table"], each["variant"]) == (table, row["variant"])]
            panel.plot(dots, [number] * len(dots), "o", color="C0", alpha=0.5, markersize=4)
            panel.plot(row["mean"], number, "|", color="black", markersize=14)
        panel.set_yticks(range(len(own)), [f"{row['variant']}  ({row['memory'] / 2**20:.4g} MiB)" for row in own], fontsize=8)
        panel.set_ylim(len(own) - 0.5, -0.5)
        panel.set_title(f"Table {table}", loc="left", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(f"{rows[0]['metric']} on {rows[0]['data']}"[-80:])
    return figure
