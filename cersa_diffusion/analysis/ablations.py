"""The ablations of the paper's Tables 2 to 6 on any classification task, as one sweep that can be interrupted and continued."""

import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch

from cersa_diffusion.analysis.kinds import targets_by_component
from cersa_diffusion.analysis.models import open_dense, read_json
from cersa_diffusion.analysis.output import Figure, grouped, new_figure
from cersa_diffusion.classification import ClassifierSettings, RunArguments, TrainReport, train_classifier
from cersa_diffusion.classification.run import METRICS_FILE
from cersa_diffusion.classification.settings import Data
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.memory.cost import DenseLayer, cersa_memory
from cersa_diffusion.memory.plan import MemoryPlan, plan_memory

SWEEP_FILE = "sweep.json"
# Table 3 of the paper does not give its r1 = r2: beta = 0.8 trains about half of the components that alpha = 0.95 keeps.
BLOCK_BETA = 0.8


@dataclass(frozen=True)
class Variant:
    """A row of one of the tables.

    Attributes:
        table: number of the table in the paper.
        title: title of the row.
        changes: the fields of `ClassifierSettings` that the row changes, with their values.
    """

    table: int
    title: str
    changes: Mapping[str, object]


_TARGETS = {"QV": "Q, V", "QKV": "Q, K, V", "QKVP": "Q, K, V, P", "all": "Q, K, V, P, UP, DN"}
# Table of the paper -> title of the row -> changes; the uniform rank of Table 5 depends on the model.
_ROWS = {
    2: {title: {"alpha": 0.95, "target_modules": [preset]} for preset, title in _TARGETS.items()},
    3: {
        title: {"alpha": 0.95, "beta": BLOCK_BETA, "block": block}
        for block, title in (("top", "top r1"), ("bottom", "bottom r2"))
    },
    4: {f"alpha = beta = {alpha:g}": {"alpha": alpha} for alpha in (1.0, 0.95, 0.9, 0.8, 0.5)}
    | {f"alpha = 0.95, beta = {beta:g}": {"alpha": 0.95, "beta": beta} for beta in (0.9, 0.8, 0.5)},
    5: {"layer-wise, alpha = 0.9": {"alpha": 0.9}},
    6: {"matrix": {"alpha": 0.9}, "array": {"alpha": 0.9, "core": "diagonal"}},
}
TABLES = tuple(_ROWS)
# The paper does not round its ranks.
_PAPER_RANKS = {"rank_multiple": 1}


def variants(settings: ClassifierSettings, tables: Sequence[int] = TABLES) -> list[Variant]:
    """The rows of some of the tables; the uniform rank of Table 5 is the one that takes as much memory as alpha = 0.9.

    Args:
        settings: settings of the run; model and targets determine the uniform rank.
        tables: numbers of the tables in the paper, 2 to 6.

    Raises:
        ConfigError: another table, or the model cannot be loaded or decomposed.
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown or not tables:
        raise ConfigError(f"tables: {unknown or 'none'} of the ablations, expected some of {', '.join(map(str, TABLES))}")
    rows = {table: dict(_ROWS[table]) for table in sorted(set(tables))}
    if 5 in rows:
        rank = _uniform_rank(settings)
        rows[5][f"uniform, r = {rank}"] = {"uniform_rank": rank}
    titled = [(table, title, changes) for table, of_table in rows.items() for title, changes in of_table.items()]
    return [Variant(table, title, {**_PAPER_RANKS, **changes}) for table, title, changes in titled]


def _uniform_rank(settings: ClassifierSettings) -> int:
    components = open_dense(settings.model_name_or_path, settings.revision)
    targets = targets_by_component(components, settings.target_modules, "QKV")["model"]
    return uniform_rank(plan_memory(components, CersaConfig(alpha=0.9, target_modules=targets, **_PAPER_RANKS)))


def uniform_rank(plan: MemoryPlan) -> int:
    """The largest rank that, kept and trained in every layer, takes no more memory than the ranks of a plan (Table 5).

    Args:
        plan: plan of a CERSA whose core is a matrix.

    Returns:
        At least 1; a layer whose full rank is smaller counts with its full rank.
    """
    config = CersaConfig(unprofitable="factor")

    def total(ranks: Sequence[LayerRanks]) -> int:
        return sum(
            cersa_memory(DenseLayer(layer.out_features, layer.in_features, False, torch.float32), layer_ranks, config).total
            for layer, layer_ranks in zip(plan.layers, ranks, strict=True)
        )

    full = [min(layer.out_features, layer.in_features) for layer in plan.layers]
    limit = total([LayerRanks(layer.kept_rank, layer.core_rank) for layer in plan.layers])
    rank = 1
    while rank < max(full) and total([LayerRanks(min(rank + 1, most), min(rank + 1, most)) for most in full]) <= limit:
        rank += 1
    return rank


def run_ablations(
    settings: ClassifierSettings,
    data: Data,
    arguments: RunArguments,
    *,
    tables: Sequence[int] = TABLES,
    seeds: Sequence[int] = (0,),
    preset: str | None = None,
) -> list[dict]:
    """Trains every variant with every seed; variants with equal settings are trained once.

    The runs are kept in `output_dir/runs`. A finished run is read and not repeated, and an interrupted run continues from its
    last checkpoint. A run has the given settings except those that its variant changes; the method is CERSA.

    Args:
        settings: model and method.
        data: source of the examples.
        arguments: arguments of the Trainer; `output_dir` is the folder of the sweep.
        tables: numbers of the tables in the paper, 2 to 6.
        seeds: seeds of the runs.
        preset: name of the preset, for the reports.

    Returns:
        A row for every variant and seed.

    Raises:
        ConfigError: there are no seeds, a table is unknown, the folder holds a sweep with other settings, or `train_classifier`
            refuses a setting.
    """
    if not seeds:
        raise ConfigError("seeds: none are given, expected at least one")
    base = replace(settings, method="cersa")
    changed_settings = [(variant, replace(base, **variant.changes)) for variant in variants(settings, tables)]
    folder = Path(arguments.output_dir)
    _note_settings(folder, settings, data, arguments)
    rows = []
    for variant, changed in changed_settings:
        for seed in dict.fromkeys(seeds):
            run_arguments = copy.copy(arguments)
            run_arguments.output_dir, run_arguments.seed = str(folder / "runs" / _run_name(base, changed) / f"seed-{seed}"), seed
            report = _train(changed, data, run_arguments, preset)
            memory = report.weight_bytes + report.gradient_bytes + report.optimizer_bytes
            run = {"table": variant.table, "variant": variant.title, "data": report.data, "metric": report.metric, "seed": seed}
            cost = {"trained": report.trainable_parameters, "memory": memory, "seconds": report.seconds}
            rows.append(run | {"score": report.score, "loss": report.loss} | cost)
    return rows


def _run_name(base: ClassifierSettings, changed: ClassifierSettings) -> str:
    """A folder name made of the changed settings, so that tables share the runs of equal settings."""
    before, after = (asdict(settings) | {"target_modules": settings.target_modules or ["QKV"]} for settings in (base, changed))
    changes = {name: value for name, value in sorted(after.items()) if value != before[name]}
    texts = [f"{name}-{'+'.join(value) if isinstance(value, list) else value}" for name, value in changes.items()]
    return "_".join(texts) or "as-given"


def _train(settings: ClassifierSettings, data: Data, arguments: RunArguments, preset: str | None) -> TrainReport:
    metrics = Path(arguments.output_dir) / METRICS_FILE
    if metrics.is_file():
        return TrainReport(**read_json(metrics))
    # In a new folder this starts from the beginning.
    arguments.resume_from_checkpoint = "latest"
    return train_classifier(settings, data, arguments, preset)


def _note_settings(folder: Path, settings: ClassifierSettings, data: Data, arguments: RunArguments) -> None:
    """Writes the settings that all runs share, or refuses a folder whose runs had other settings."""
    not_shared = ("output_dir", "logging_dir", "run_name", "seed", "data_seed", "resume_from_checkpoint")
    shared = {name: value for name, value in arguments.to_dict().items() if name not in not_shared}
    now = json.loads(json.dumps({**asdict(settings), **asdict(data), **shared}, default=str))
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
    for (table, title), runs in grouped(rows, itemgetter("table", "variant")).items():
        scores = [run["score"] for run in runs]
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        statistic = {"seeds": len(scores), "mean": statistics.fmean(scores), "deviation": deviation}
        cost = {name: runs[0][name] for name in ("trained", "memory")}
        summary.append({"table": table, "variant": title, "metric": runs[0]["metric"]} | statistic | cost)
    return summary


def draw_ablations(rows: Sequence[Mapping]) -> Figure:
    """A panel for every table: the mean score of every variant, a dot for every seed, and the memory of its training."""
    by_table = grouped(sorted(summary_rows(rows), key=itemgetter("table")), itemgetter("table"))
    runs = grouped(rows, itemgetter("table", "variant"))
    heights = [1 + len(summary) for summary in by_table.values()]
    figure, panels = new_figure(9, 0.5 + 0.42 * sum(heights), lines=len(heights), sharex=True, height_ratios=heights)
    for panel, (table, summary) in zip(panels, by_table.items(), strict=True):
        for number, row in enumerate(summary):
            scores = [run["score"] for run in runs[table, row["variant"]]]
            panel.plot(scores, [number] * len(scores), "o", color="C0", alpha=0.5, markersize=4)
            panel.plot(row["mean"], number, "|", color="black", markersize=14)
        labels = [f"{row['variant']}  ({row['memory'] / 2**20:.4g} MiB)" for row in summary]
        panel.set_yticks(range(len(summary)), labels, fontsize=8)
        panel.set_ylim(len(summary) - 0.5, -0.5)
        panel.set_title(f"Table {table}", loc="left", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(f"{rows[0]['metric']} on {rows[0]['data']}"[-80:])
    return figure
