"""How much of the other data sets fine-tuning on one made a model forget: the paper's Table 15.

The paper does not say how a model that was fine-tuned on one data set is judged on another, whose classes it has no outputs for.
Here it is a linear probe: logistic regression on the frozen model's features, fitted anew on the training examples of each data
set, the same for the pre-trained model and for the fine-tuned ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, DataCollatorWithPadding, default_data_collator

from cersa_diffusion.analysis.models import RESULT_DESCRIPTION, open_model, read_json
from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.analysis.subspaces import forgetting_rate
from cersa_diffusion.classification.data import LABELS, Splits
from cersa_diffusion.classification.images import load_images, with_pixels
from cersa_diffusion.classification.model import KINDS, load_base
from cersa_diffusion.classification.run import RESULT_FOLDER, SETTINGS_FILE
from cersa_diffusion.classification.settings import ImageData, TextData
from cersa_diffusion.classification.texts import load_texts, metric_name, text_columns, token_limit, with_tokens
from cersa_diffusion.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """A finished classification run.

    Attributes:
        folder: the `output_dir` of its training.
        method: that was trained.
        kind: "image" or "text".
        base: name or path of the pre-trained model, and its revision.
        data: what was learned.
        seed: of the run.
    """

    folder: Path
    method: str
    kind: str
    base: tuple[str, str | None]
    data: ImageData | TextData
    seed: int

    @property
    def result(self) -> Path:
        """The folder that `load_classifier` opens."""
        return self.folder / RESULT_FOLDER


def read_run(folder: str | Path) -> Run:
    """What a run's folder says of it.

    Raises:
        ConfigError: not the folder of a finished run.
    """
    folder = Path(folder)
    if not (folder / RESULT_FOLDER / RESULT_DESCRIPTION).is_file():
        raise ConfigError(f"{folder}: no finished classification run (no {RESULT_FOLDER}/{RESULT_DESCRIPTION} in it)")
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
        raise ConfigError(f"the runs start from {len(bases)} models, {sorted(base[1][0] for base in bases)}: expected one")
    names = {run.data.name for run in runs}
    if len(names) < 2:
        raise ConfigError(
            f"all runs learned {', '.join(names) or 'nothing'}: forgetting is measured on the data of the others, "
            "expected runs on at least two data sets"
        )
    for run in runs:
        if isinstance(run.data, TextData) and metric_name(run.data) == "pearson":
            raise ConfigError(f"{run.folder}: {run.data.name} has numbers to predict, expected classes for the linear probe")


def forgetting_rows(folders: Sequence[str | Path], *, batch: int = 64, device: str | None = None) -> list[dict]:
    """A row for every run and every data set but its own: accuracy of the probe before and after.

    Args:
        folders: of finished runs of `train_classifier`, all from one pre-trained model, on at least two data sets.
        batch: examples per forward pass.
        device: where the models run; None: the GPU where there is one.

    Returns:
        Rows with "method", "seed", "learned", "tested", "before", "after" and "run".

    Raises:
        ConfigError: such runs are not given, or the data are no longer there.
        NonFiniteError: a model's features are NaN or infinite.
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
                place = {"method": run.method, "seed": run.seed, "learned": run.data.name, "tested": name}
                after = _probe(model, splits, collator, batch, device)
                rows.append(place | {"before": before[name], "after": after, "run": str(run.folder)})
    return rows


def _pretrained(run: Run) -> nn.Module:
    config = AutoConfig.from_pretrained(run.base[0], revision=run.base[1])
    return _backbone(load_base(run.kind, run.base[0], config, revision=run.base[1], dtype=torch.float32)[0].eval())


def _backbone(model: nn.Module) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def _prepared(run: Run) -> tuple[Splits, object]:
    """The examples as the model takes them, in order and unchanged, and what makes batches of them."""
    processor = KINDS[run.kind].processor.from_pretrained(str(run.result))
    if isinstance(run.data, ImageData):
        still = replace(run.data, random_flip=False, random_resized_crop=False)
        return with_pixels(load_images(still, run.seed), processor, still, run.seed), default_data_collator
    limit = token_limit(run.data.max_length, processor, AutoConfig.from_pretrained(str(run.result)))
    splits = with_tokens(load_texts(run.data, run.seed), processor, text_columns(run.data), limit)
    return splits, DataCollatorWithPadding(processor)


def _probe(model: nn.Module, splits: Splits, collator, batch: int, device: str) -> float:
    """Accuracy of a logistic regression on the model's features, over all examples to evaluate on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = model.to(device).eval()
    train, labels = _features(model, splits.train, collator, batch, device)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels)
    parts = [_features(model, rows, collator, batch, device) for rows in splits.validation.values()]
    features, expected = (np.concatenate(own) for own in zip(*parts, strict=True))
    return float(probe.score(features, expected))


@torch.no_grad()
def _features(model: nn.Module, rows, collator, batch: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The last hidden states, averaged over the tokens: (examples, width), and the labels."""
    features, labels = [], []
    for inputs in _batches(rows, collator, batch, device):
        labels.append(inputs.pop(LABELS).cpu().numpy())
        states = model(**inputs).last_hidden_state.float()
        mask = inputs.get("attention_mask", torch.ones(states.shape[:2], device=device))[..., None].float()
        features.append(((states * mask).sum(1) / mask.sum(1)).cpu().numpy())
    found = np.concatenate(features)
    if not np.isfinite(found).all():
        raise NonFiniteError("the features of a model hold NaN or infinity: its training diverged, or its checkpoint is damaged")
    return found, np.concatenate(labels)


def _batches(rows, collator, batch: int, device: str) -> Iterator[dict]:
    for inputs in DataLoader(rows, batch, collate_fn=collator):
        yield {name: tensor.to(device) for name, tensor in inputs.items()}


def rate_rows(rows: Sequence[Mapping]) -> list[dict]:
    """A row for every run: its forgetting rate over the other data sets."""
    rates = []
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        rate = forgetting_rate([row["before"] for row in own], [row["after"] for row in own])
        rates.append({name: own[0][name] for name in ("method", "seed", "learned")} | {"forgetting_rate": rate, "run": run})
    return rates


def method_rows(rates: Sequence[Mapping]) -> list[dict]:
    """A row for every method, as Table 15 has them: the mean over its runs of their forgetting rates.

    Args:
        rates: of `rate_rows`.
    """
    methods = dict.fromkeys(row["method"] for row in rates)
    by_method = {method: [row["forgetting_rate"] for row in rates if row["method"] == method] for method in methods}
    return [
        {
            "method": method,
            "runs": len(own),
            "average_forgetting_rate": float(np.mean(own)),
            "lowest": min(own),
            "highest": max(own),
        }
        for method, own in by_method.items()
    ]


def draw_forgetting(rows: Sequence[Mapping]) -> "Figure":
    """A panel for every data set that was learned: accuracy on the others before (grey) and after, by method (CERSA, Fig. 10)."""
    learned, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("learned", "method"))
    figure = new_figure(2 + 3.4 * len(learned), 4.5, "accuracy of a linear probe on data that were not learned")
    panels = figure.subplots(1, len(learned), squeeze=False, sharey=True)[0]
    width = 0.8 / (len(methods) + 1)
    for panel, name in zip(panels, learned, strict=True):
        tested = list(dict.fromkeys(row["tested"] for row in rows if row["learned"] == name))
        for number, title in enumerate(["pre-trained", *methods]):
            heights = []
            for place in tested:
                own = [row for row in rows if (row["learned"], row["tested"]) == (name, place)]
                values = [row["before"] for row in own] if not number else [row["after"] for row in own if row["method"] == title]
                heights.append(float(np.mean(values)) if values else 0.0)
            places = [place + (number - len(methods) / 2) * width for place in range(len(tested))]
            panel.bar(places, heights, width, label=title, color="gray" if not number else f"C{number - 1}")
        panel.set_xticks(range(len(tested)), [_short(place) for place in tested], rotation=20, fontsize=8)
        panel.set_title(f"learned: {_short(name)}", fontsize=9)
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(methods))
    return figure


def _short(name: str) -> str:
    return "/".join(Path(name).parts[-2:])
