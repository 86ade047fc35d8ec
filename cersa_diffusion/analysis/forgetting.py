"""How much fine-tuning on one data set reduces the accuracy on other data sets: Table 15 of the paper.

A model that was fine-tuned on one data set has no outputs for the classes of another, and the paper does not say how it measures
the accuracy there. Here a linear probe measures it: logistic regression on the features of the frozen model, fitted on the
training examples of each data set, in the same way for the pre-trained model and for the fine-tuned ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig

from cersa_diffusion.analysis.models import RESULT_DESCRIPTION, open_model, read_json
from cersa_diffusion.analysis.output import Figure, grouped, new_figure
from cersa_diffusion.analysis.subspaces import forgetting_rate
from cersa_diffusion.classification.data import LABELS, Splits
from cersa_diffusion.classification.model import KINDS, load_base
from cersa_diffusion.classification.run import RESULT_FOLDER, SETTINGS_FILE, load_splits, model_inputs
from cersa_diffusion.classification.settings import Data, ImageData, TextData
from cersa_diffusion.classification.texts import metric_name
from cersa_diffusion.errors import ConfigError, NonFiniteError


@dataclass(frozen=True)
class Run:
    """A finished classification run.

    Attributes:
        folder: the `output_dir` of its training.
        method: the fine-tuning method.
        kind: "image" or "text".
        base: name or path of the pre-trained model, and its revision.
        data: source of the examples.
        seed: seed of the run.
    """

    folder: Path
    method: str
    kind: str
    base: tuple[str, str | None]
    data: Data
    seed: int

    @property
    def result(self) -> Path:
        """The folder that `load_classifier` opens."""
        return self.folder / RESULT_FOLDER


def read_run(folder: str | Path) -> Run:
    """Reads the description of a finished run from its folder.

    Raises:
        ConfigError: the folder does not hold a finished run.
    """
    folder = Path(folder)
    if not (folder / RESULT_FOLDER / RESULT_DESCRIPTION).is_file():
        raise ConfigError(f"{folder}: not a finished classification run, {RESULT_FOLDER}/{RESULT_DESCRIPTION} is missing")
    description, settings = read_json(folder / RESULT_FOLDER / RESULT_DESCRIPTION), read_json(folder / SETTINGS_FILE)
    data_class = ImageData if description["kind"] == "image" else TextData
    data = data_class(**{f.name: settings[f.name] for f in fields(data_class) if f.name in settings})
    base = description["base_model"]["name_or_path"], description["base_model"]["revision"]
    return Run(folder, description["method"], description["kind"], base, data, settings["seed"])


def _check_runs(runs: Sequence[Run]) -> None:
    if find_spec("sklearn") is None:
        raise ConfigError("the linear probe needs scikit-learn: pip install 'cersa-diffusion[train]'")
    bases = {(run.kind, run.base) for run in runs}
    if len(bases) > 1:
        raise ConfigError(f"the runs start from {len(bases)} models, {sorted(base[0] for _, base in bases)}: expected one")
    names = {run.data.name for run in runs}
    if len(names) < 2:
        raise ConfigError(
            f"all runs were trained on {', '.join(names) or 'nothing'}: expected runs on at least two data sets, because "
            "forgetting is measured on the data of the other runs"
        )
    for run in runs:
        if isinstance(run.data, TextData) and metric_name(run.data) == "pearson":
            raise ConfigError(f"{run.folder}: {run.data.name} has numbers as labels, but the linear probe expects classes")


def forgetting_rows(folders: Sequence[str | Path], *, batch: int = 64, device: str | None = None) -> list[dict]:
    """A row for every run and every data set except its own: accuracy of the probe before and after fine-tuning.

    Args:
        folders: folders of finished runs of `train_classifier`, all from one pre-trained model, on at least two data sets.
        batch: examples per forward pass.
        device: device of the models; None: the GPU if there is one.

    Returns:
        Rows with "method", "seed", "learned", "tested", "before", "after" and "run".

    Raises:
        ConfigError: the folders do not hold such runs, or the data do not exist any more.
        NonFiniteError: the features of a model are NaN or infinite.
    """
    runs = [read_run(folder) for folder in folders]
    _check_runs(runs)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = {run.data.name: _prepared(run) for run in runs}
    before = {name: _probe(_pretrained(runs[0]), splits, collator, batch, device) for name, (splits, collator) in data.items()}
    rows = []
    for run in tqdm(runs, "runs"):
        model = _backbone(open_model(run.result).components["model"])
        for name, (splits, collator) in data.items():
            if name != run.data.name:
                row = {"method": run.method, "seed": run.seed, "learned": run.data.name, "tested": name}
                after = _probe(model, splits, collator, batch, device)
                rows.append(row | {"before": before[name], "after": after, "run": str(run.folder)})
    return rows


def _pretrained(run: Run) -> nn.Module:
    path, revision = run.base
    config = AutoConfig.from_pretrained(path, revision=revision)
    return _backbone(load_base(run.kind, path, config, revision=revision, dtype=torch.float32)[0].eval())


def _backbone(model: nn.Module) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def _prepared(run: Run) -> tuple[Splits, Callable]:
    """The examples as inputs of the model, in order and without augmentation, and the collator that makes batches of them."""
    processor = KINDS[run.kind].processor.from_pretrained(str(run.result))
    plain = {"random_flip": False, "random_resized_crop": False} if isinstance(run.data, ImageData) else {}
    data, config = replace(run.data, **plain), AutoConfig.from_pretrained(str(run.result))
    return model_inputs(load_splits(data, run.seed), processor, data, config, run.seed)


def _probe(model: nn.Module, splits: Splits, collator, batch: int, device: str) -> float:
    """Accuracy of a logistic regression on the features of the model, over all examples to evaluate on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = model.to(device).eval()
    train, labels = _features(model, splits.train, collator, batch, device)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels)
    validation = [_features(model, rows, collator, batch, device) for rows in splits.validation.values()]
    features, labels = (np.concatenate(arrays) for arrays in zip(*validation, strict=True))
    return float(probe.score(features, labels))


@torch.no_grad()
def _features(model: nn.Module, rows, collator, batch: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The last hidden states averaged over the tokens, (examples, width), and the labels, (examples,)."""
    means, labels = [], []
    for examples in DataLoader(rows, batch, collate_fn=collator):
        inputs = {name: tensor.to(device) for name, tensor in examples.items()}
        labels.append(inputs.pop(LABELS).cpu().numpy())
        states = model(**inputs).last_hidden_state.float()
        mask = inputs.get("attention_mask", torch.ones(states.shape[:2], device=device))[..., None].float()
        means.append(((states * mask).sum(1) / mask.sum(1)).cpu().numpy())
    features = np.concatenate(means)
    if not np.isfinite(features).all():
        raise NonFiniteError("the features of a model hold NaN or infinity: its training diverged, or its checkpoint is damaged")
    return features, np.concatenate(labels)


def rate_rows(rows: Sequence[Mapping]) -> list[dict]:
    """A row for every run: its forgetting rate over the other data sets."""
    rates = []
    for run, of_run in grouped(rows, itemgetter("run")).items():
        rate = forgetting_rate([row["before"] for row in of_run], [row["after"] for row in of_run])
        rates.append({name: of_run[0][name] for name in ("method", "seed", "learned")} | {"forgetting_rate": rate, "run": run})
    return rates


def method_rows(rates: Sequence[Mapping]) -> list[dict]:
    """A row for every method, as in Table 15: the mean of the forgetting rates of its runs, from the rows of `rate_rows`."""
    rows = []
    for method, runs in grouped(rates, itemgetter("method")).items():
        values = [run["forgetting_rate"] for run in runs]
        row = {"method": method, "runs": len(runs), "average_forgetting_rate": float(np.mean(values))}
        rows.append(row | {"lowest": min(values), "highest": max(values)})
    return rows


def draw_forgetting(rows: Sequence[Mapping]) -> Figure:
    """A panel for every learned data set: accuracy on the other data sets before (grey) and after, by method (CERSA, Fig. 10)."""
    by_learned, methods = grouped(rows, itemgetter("learned")), list(grouped(rows, itemgetter("method")))
    title = "accuracy of a linear probe on data that were not learned"
    figure, panels = new_figure(2 + 3.4 * len(by_learned), 4.5, title, columns=len(by_learned), sharey=True)
    width = 0.8 / (len(methods) + 1)
    for panel, (learned, of_learned) in zip(panels, by_learned.items(), strict=True):
        by_tested = grouped(of_learned, itemgetter("tested"))
        for number, label in enumerate(["pre-trained", *methods]):
            heights = []
            for tested in by_tested.values():
                before, after = [row["before"] for row in tested], [row["after"] for row in tested if row["method"] == label]
                values = after if number else before
                heights.append(float(np.mean(values)) if values else 0.0)
            positions = [position + (number - len(methods) / 2) * width for position in range(len(by_tested))]
            panel.bar(positions, heights, width, label=label, color=f"C{number - 1}" if number else "gray")
        panel.set_xticks(range(len(by_tested)), [_short(name) for name in by_tested], rotation=20, fontsize=8)
        panel.set_title(f"learned: {_short(learned)}", fontsize=9)
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(methods))
    return figure


def _short(name: str) -> str:
    return "/".join(Path(name).parts[-2:])
