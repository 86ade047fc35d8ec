"""The metrics against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cersa_diffusion import ConfigError
from cersa_diffusion.classification.presets import preset, preset_names
from cersa_diffusion.classification.scores import METRICS
from cersa_diffusion.classification.tasks import GLUE_TASKS

from ..conftest import raises

CLASSES = arrays.arrays(np.int64, 12, elements=st.integers(0, 1))


@given(CLASSES, CLASSES)
def test_accuracy_and_matthews_by_the_table_of_four(found, right):
    logits = np.eye(2)[found]
    tp, tn = int(((found == 1) & (right == 1)).sum()), int(((found == 0) & (right == 0)).sum())
    fp, fn = int(((found == 1) & (right == 0)).sum()), int(((found == 0) & (right == 1)).sum())
    assert METRICS["accuracy"](logits, right) == pytest.approx((tp + tn) / 12)
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert METRICS["matthews"](logits, right) == pytest.approx((tp * tn - fp * fn) / root if root else 0, abs=1e-12)


@given(arrays.arrays(np.float64, 10, elements=st.integers(-9, 9)), arrays.arrays(np.float64, 10, elements=st.integers(-9, 9)))
def test_pearson_by_its_definition(found, right):
    a, b = found - found.mean(), right - right.mean()
    size = np.sqrt((a**2).sum() * (b**2).sum())
    assert METRICS["pearson"](found[:, None], right) == pytest.approx((a * b).sum() / size if size else 0, abs=1e-9)


def test_every_task_has_its_metric_of_the_paper():
    metrics = {name: task.metric for name, task in GLUE_TASKS.items()}
    assert metrics.pop("cola") == "matthews" and metrics.pop("stsb") == "pearson" and set(metrics.values()) == {"accuracy"}
    assert len(GLUE_TASKS) == 8 and len(GLUE_TASKS["mnli"].validation) == 2


def test_presets_are_the_papers():
    values, table = preset("vit-large/fgvc-aircraft", ("vit-base", "vit-large"))
    assert table == "Table 11" and values["learning_rate"] == 2e-3 and values["classifier_learning_rate"] == 6e-3
    values, table = preset("vit-base/oxford-pets", ("vit-base",))
    assert table == "Table 12" and values["attention_dropout"] == 0 and values["weight_decay"] == 0.01
    values, table = preset("deberta-v3-base/stsb", ("deberta-v3-base",))
    assert table == "Table 13" and values == {
        "max_length": 128,
        "num_train_epochs": 15,
        "per_device_train_batch_size": 32,
        "classifier_dropout": 0.2,
        "weight_decay": 0.1,
        "learning_rate": 2e-4,
        "classifier_learning_rate": 4e-4,
        "task_name": "stsb",
    }
    assert len(preset_names(("vit-base", "vit-large", "deberta-v3-base"))) == 24
    with raises(ConfigError, "preset", "'vit-huge/dtd'", "vit-base/cifar-100"):
        preset("vit-huge/dtd", ("vit-base",))
