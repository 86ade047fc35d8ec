"""Whole runs: figures, resuming, and what is refused before anything is written."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cersa_diffusion import CersaError, ConfigError, NonFiniteError
from cersa_diffusion.classification import (
    ClassifierSettings,
    ImageData,
    RunArguments,
    TextData,
    load_classifier,
    train_classifier,
)
from cersa_diffusion.training.checkpoints.folder import WEIGHTS_FILE

from ..conftest import assert_named, raises, warns


def run(model: Path, data, output: Path, **changes):
    """A run of eight steps; `changes` go to the settings that know them."""
    own = {key: changes.pop(key) for key in list(changes) if key in ClassifierSettings.__dataclass_fields__}
    values = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True}
    arguments = RunArguments(output_dir=str(output), **values | changes)
    return train_classifier(ClassifierSettings(model_name_or_path=str(model), **own), data, arguments)


def text_data(files) -> TextData:
    return TextData(train_file=str(files[0]), validation_file=[str(files[1])], text_pair_column="second")


def test_report_counts_what_is_there(model_path, text_files, tmp_path):
    report = run(model_path("bert"), text_data(text_files), tmp_path / "run", method="cersa")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["score"] == report.score == report.scores["validation"] and written["examples"] == {
        "train": 32,
        "validation": 16,
    }
    assert str(tmp_path.parent).encode() not in (Path(report.result) / "pytorch_cersa_weights.safetensors").read_bytes()
    model, tokenizer = load_classifier(report.result)
    cores = sum(core.D.numel() for layer in model.modules() for core in getattr(layer, "cores", {}).values())
    head = sum(p.numel() for p in model.classifier.parameters()) + sum(p.numel() for p in model.bert.pooler.parameters())
    assert report.trainable_parameters == cores + head and report.head_parameters == head
    assert report.gradient_bytes == 4 * (cores + head) and report.optimizer_bytes >= 8 * (cores + head)
    assert "| cersa |" in report.row and report.row.count("\n") == 3
    # What the saved result says of the examples is what the report says.
    rows = text_files[1].read_text().splitlines()[1:]
    texts, seconds, labels = zip(*(row.split(",") for row in rows), strict=True)
    with torch.no_grad():
        found = model(**tokenizer(list(texts), list(seconds), padding=True, return_tensors="pt")).logits.argmax(-1)
    right = [model.config.id2label[int(i)] == label for i, label in zip(found, labels, strict=True)]
    assert sum(right) / len(right) == report.score


def test_pictures_are_learned(model_path, picture_folders, tmp_path):
    data = ImageData(train_dir=str(picture_folders[0]), validation_dir=str(picture_folders[1]), random_flip=True)
    report = run(model_path("vit"), data, tmp_path / "run", method="cersa", max_steps=20, bf16=True)
    assert report.score > 0.9 and report.metric == "accuracy"


def test_numbers_are_predicted(model_path, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("sentence1,sentence2,label\n" + "".join(f"the cat,{'good ' * (i % 6)}dog,{i % 6}\n" for i in range(48)))
    data = TextData(task_name="stsb", train_file=str(path), validation_file=[str(path)])
    report = run(model_path("deberta-v3"), data, tmp_path / "run", method="lora", rank=4, max_steps=30)
    assert report.metric == "pearson" and report.score > 0.8
    assert load_classifier(report.result)[0].config.num_labels == 1


@pytest.mark.parametrize("method", ["cersa", "pissa", "full"])
def test_resumed_equals_uninterrupted_bit_for_bit(method, model_path, picture_folders, tmp_path):
    data = ImageData(train_dir=str(picture_folders[0]), validation_dir=str(picture_folders[1]), random_resized_crop=True)
    own = {"method": method, "rank": 4, "save_steps": 3, "attention_dropout": 0.1, "save_strategy": "steps"}
    own |= {} if method == "pissa" else {"rank": 32}
    whole = run(model_path("vit"), data, tmp_path / "run", **own)
    last = load_file(tmp_path / "run" / "checkpoint-8" / WEIGHTS_FILE)
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    if method == "full":
        # From the middle of the second epoch, whose crops are others; otherwise of the first.
        before = "checkpoint-6"
    else:
        # As where writing it was interrupted.
        (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").write_text("{")
        before = "checkpoint-3"
    with warnings.catch_warnings(record=True) as said:
        resumed = run(model_path("vit"), data, tmp_path / "run", resume_from_checkpoint="latest", **own)
    assert any("checkpoint-6" in str(w.message) for w in said) == (before == "checkpoint-3")
    assert resumed.loss == pytest.approx(whole.loss)
    again = load_file(tmp_path / "run" / "checkpoint-8" / WEIGHTS_FILE)
    assert last.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in last.items())
    assert whole.scores == resumed.scores and resumed.steps == 8


def test_a_run_goes_on_with_a_lower_learning_rate(model_path, text_files, tmp_path):
    """The new rate counts from the resumed step on, where the schedule is; the classifier's own rate stays."""
    own = {"method": "cersa", "classifier_learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    output = tmp_path / "run"
    run(model_path("bert"), text_data(text_files), output, learning_rate=1e-2, weight_decay=0.0, **own)
    shutil.rmtree(output / "checkpoint-8")
    resume = own | {"resume_from_checkpoint": "latest", "weight_decay": 0.0}
    with raises(ConfigError, "seed"):
        run(model_path("bert"), text_data(text_files), output, learning_rate=1e-15, seed=3, **resume)
    with pytest.warns(UserWarning, match="learning_rate") as said:
        run(model_path("bert"), text_data(text_files), output, learning_rate=1e-15, **resume)
    assert_named(next(str(w.message) for w in said if "learning_rate" in str(w.message)), "0.01", "1e-15", "4")
    log = json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if entry["step"] > 4 and "learning_rate" in entry]
    # The warm-up of the eight steps is one; from there it falls to nothing.
    assert rates == pytest.approx([1e-15 * left / 7 for left in (4, 3, 2, 1)], rel=1e-6, abs=0.0)
    before, after = (load_file(output / f"checkpoint-{step}" / WEIGHTS_FILE) for step in (4, 8))
    assert {".cores." in name for name in before if (after[name] - before[name]).abs().max() > 1e-9} == {False}
    # All steps are done: another rate would say what is not so.
    with raises(ConfigError, "learning_rate"):
        run(model_path("bert"), text_data(text_files), output, learning_rate=1e-4, **resume)


def test_a_run_goes_on_on_another_machine(model_path, text_files, tmp_path, other_machine):
    options = {"method": "cersa", "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 6}
    whole = run(model_path("bert"), text_data(text_files), tmp_path / "run", **options)
    for step in range(6, whole.steps + 1):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}", ignore_errors=True)
    other_machine()
    with warns(UserWarning, "checkpoint-3", "moments"):
        moved = run(model_path("bert"), text_data(text_files), tmp_path / "run", resume_from_checkpoint="latest", **options)
    assert moved.steps == whole.steps and moved.loss == pytest.approx(whole.loss, rel=0.02) and moved.loss != whole.loss


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_the_last_step_is_in_a_checkpoint_whatever_is_saved_on_the_way(model_path, text_files, tmp_path, monkeypatch, strategy):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    options = {"method": "cersa", "save_strategy": strategy}
    with monkeypatch.context() as patch:
        patch.setattr("cersa_diffusion.classification.run.save_classifier", full_disk)
        with raises(CersaError, str(tmp_path / "run" / "result"), "--resume_from_checkpoint latest"):
            run(model_path("bert"), text_data(text_files), tmp_path / "run", **options)
    assert not (tmp_path / "run" / "metrics.json").exists() and not list((tmp_path / "run").glob("result/*"))
    finished = run(model_path("bert"), text_data(text_files), tmp_path / "run", resume_from_checkpoint="latest", **options)
    whole = run(model_path("bert"), text_data(text_files), tmp_path / "whole", **options)
    first, second = (load_file(Path(report.result) / "pytorch_cersa_weights.safetensors") for report in (finished, whole))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_finished_run_resumed_keeps_its_figures(model_path, text_files, tmp_path):
    own = {"method": "cersa", "save_strategy": "steps", "save_steps": 8}
    whole = run(model_path("bert"), text_data(text_files), tmp_path / "run", **own)
    again = run(model_path("bert"), text_data(text_files), tmp_path / "run", resume_from_checkpoint="latest", **own)
    assert (again.score, again.loss, again.steps) == (whole.score, whole.loss, 8) and again.seconds > 0.5 * whole.seconds


@pytest.mark.parametrize("method", ["lora", "full", "cersa"])
def test_a_loss_that_is_lost_ends_the_run(method, model_path, text_files, tmp_path):
    with raises(NonFiniteError, "learning_rate", "1e+30"):
        run(model_path("bert"), text_data(text_files), tmp_path / "run", method=method, learning_rate=1e30, max_grad_norm=0.0)
    assert not (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run" / "result").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_memory_budget_holds_the_head_too(bf16, model_path, text_files, tmp_path):
    # With exact ranks, because a budget for layers as small as these cannot be filled in multiples of 8.
    own = {"max_steps": 1, "bf16": bf16, "rank_multiple": 1}
    most, least = (
        run(model_path("bert"), text_data(text_files), tmp_path / str(alpha), method="cersa", alpha=alpha, **own)
        for alpha in (1.0, 0.3)
    )
    total = {report.result: report.weight_bytes + report.gradient_bytes + report.optimizer_bytes for report in (most, least)}
    budget = sum(total.values()) // 2
    report = run(model_path("bert"), text_data(text_files), tmp_path / "run", method="cersa", memory_budget=str(budget), **own)
    assert 0.95 * budget <= report.weight_bytes + report.gradient_bytes + report.optimizer_bytes <= budget


def test_the_best_checkpoint_of_several_splits_is_that_of_the_first(model_path, text_files, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text(text_files[1].read_text())
    data = TextData(train_file=str(text_files[0]), validation_file=[str(text_files[1]), str(other)], text_pair_column="second")
    own = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    run(model_path("bert"), data, tmp_path / "run", method="lora", rank=4, **own)
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    name = next(key for key in state["log_history"][-1] if key.endswith("_loss"))
    assert state["best_metric"] == min(e[name] for e in state["log_history"] if name in e)


def test_the_best_checkpoint_is_what_is_saved(model_path, picture_folders, tmp_path):
    data = ImageData(train_dir=str(picture_folders[0]), validation_dir=str(picture_folders[1]))
    own = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    report = run(model_path("vit"), data, tmp_path / "run", method="cersa", metric_for_best_model="accuracy", **own)
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert report.score == state["best_metric"] == max(e["eval_accuracy"] for e in state["log_history"] if "eval_accuracy" in e)


def test_two_learning_rates(model_path, text_files, tmp_path):
    """With a rate of nearly nothing for the layers only the head moves, and the other way round."""
    moved = {}
    for name, rates in {"head": (1e-12, 1e-2), "layers": (1e-2, 1e-12)}.items():
        own = {"learning_rate": rates[0], "classifier_learning_rate": rates[1], "weight_decay": 0.0, "save_strategy": "steps"}
        run(model_path("roberta"), text_data(text_files), tmp_path / name, method="cersa", save_steps=1, **own)
        first, last = (load_file(tmp_path / name / f"checkpoint-{step}" / WEIGHTS_FILE) for step in (1, 8))
        moved[name] = {key for key in first if (first[key] - last[key]).abs().max() > 1e-6}
    assert moved["head"] and all(".classifier." in key for key in moved["head"])
    assert moved["layers"] and all(".cores." in key for key in moved["layers"])


def test_folders_and_checkpoints_that_cannot_be_used_are_refused(model_path, text_files, tmp_path):
    own = {"method": "cersa", "max_steps": 2}
    run(model_path("bert"), text_data(text_files), tmp_path / "run", **own)
    with raises(ConfigError, "output_dir", str(tmp_path / "run"), "--resume_from_checkpoint latest"):
        run(model_path("bert"), text_data(text_files), tmp_path / "run", **own)
    with raises(ConfigError, "resume_from_checkpoint", str(tmp_path / "run"), "alpha"):
        run(model_path("bert"), text_data(text_files), tmp_path / "run", resume_from_checkpoint="latest", alpha=0.5, **own)
    with raises(ConfigError, "resume_from_checkpoint", "/no/such", "'latest'"):
        run(model_path("bert"), text_data(text_files), tmp_path / "run", resume_from_checkpoint="/no/such", **own)
    with raises(CersaError, str(tmp_path), "checkpoint", "classification"):
        run(model_path("bert"), text_data(text_files), tmp_path / "other", resume_from_checkpoint=str(tmp_path), **own)


def test_models_and_results_that_are_not_there_are_named(model_path, text_files, tmp_path):
    with raises(ConfigError, "/no/such/model", "owner/name"):
        run(Path("/no/such/model"), text_data(text_files), tmp_path / "run")
    with raises(ConfigError, "model", str(model_path("vit"))):
        run(model_path("vit"), text_data(text_files), tmp_path / "run")
    with raises(ConfigError, str(tmp_path), "cersa_classifier.json"):
        load_classifier(tmp_path)
    assert not (tmp_path / "run").exists()
