"""Every method on every architecture: trains, saves, and opens to the same logits."""

import re
import shutil

import pytest
import torch
import transformers.integrations.peft
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BatchFeature,
    Trainer,
    TrainingArguments,
    set_seed,
)

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, BaseMismatchError, ConfigError
from cersa_diffusion.classification import ClassifierSettings, RunArguments, load_classifier
from cersa_diffusion.classification.model import load_config, load_for_training, load_processor
from cersa_diffusion.classification.result import save_classifier
from cersa_diffusion.classification.targets import LAYERS, target_pattern
from cersa_diffusion.classification.trainer import ClassifierTrainer
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.methods.base import head_state
from cersa_diffusion.methods.cersa import load_head

from ..conftest import DEVICE, raises

ARCHITECTURES = ("vit", "bert", "roberta", "deberta-v2", "deberta-v3")
# With these rates four steps change the logits by a good part.
OPTIONS = {
    "cersa": {"alpha": 0.9},
    "svfit": {"svfit_rank": 12},
    "svft": {},
    "lora": {"rank": 4},
    "pissa": {"rank": 4},
    "dora": {"rank": 4},
    "full": {},
}
RATES = {"svfit": 5e-2, "svft": 3e-2, "full": 2e-3}
# The adapter file stores 16 bit.
LIMITS = {"cersa": 5e-3, "svfit": 5e-3, "svft": 5e-3, "lora": 1e-5, "pissa": 1e-4, "dora": 1e-5, "full": 1e-6}


def prepared(name: str, model_path, **options):
    """A classifier of three classes, prepared for a method."""
    kind = "image" if name == "vit" else "text"
    dtype = options.pop("compute_dtype", torch.float32)
    settings = ClassifierSettings(model_name_or_path=str(model_path(name)), **options)
    return load_for_training(kind, settings, load_processor(kind, settings), load_config(settings, ["a", "b", "c"]), 0, dtype)


def inputs(name: str, count: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, 16, (count, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def examples(name: str, count: int = 32) -> Dataset:
    columns = {key: value.tolist() for key, value in inputs(name, count).items()}
    return Dataset.from_dict(columns | {"labels": [i % 3 for i in range(count)]}).with_format("torch")


def arguments(folder, **changes) -> RunArguments:
    values = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True} | changes
    return RunArguments(output_dir=str(folder), use_cpu=DEVICE.type == "cpu", **values)


def logits(model, name: str) -> torch.Tensor:
    model.eval()
    model.to(DEVICE)
    batch = BatchFeature(inputs(name)).to(DEVICE, next(model.parameters()).dtype)
    with torch.no_grad():
        return model(**batch).logits.float()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_saved_and_opened_gives_the_same_logits(name, method, model_path, tmp_path):
    classifier = prepared(name, model_path, method=method, **OPTIONS[method])
    before = logits(classifier.model, name)
    rate = RATES.get(method, 1e-2)
    trainer = ClassifierTrainer(classifier, args=arguments(tmp_path, learning_rate=rate), train_dataset=examples(name))
    trainer.train()
    after = logits(classifier.model, name)
    trainer.save_model(str(tmp_path / "result"))
    model, _ = load_classifier(tmp_path / "result")
    # The bound means something only if training changed much more than it allows.
    assert (after - before).norm() > 0.05 * before.norm()
    assert (logits(model, name) - after).norm() <= LIMITS[method] * after.norm()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_transformers_need_not_accept_the_installed_peft(method, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "99")
    classifier = prepared("bert", model_path, method=method, **OPTIONS[method])
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = ClassifierTrainer(classifier, args=arguments(tmp_path, **options), train_dataset=examples("bert"))
    trainer.train()
    trainer.save_model(str(tmp_path / "result"))
    expected = logits(classifier.model, "bert")
    assert (logits(load_classifier(tmp_path / "result")[0], "bert") - expected).norm() <= LIMITS[method] * expected.norm()
    again = prepared("bert", model_path, method=method, **OPTIONS[method])
    resumed = ClassifierTrainer(again, args=arguments(tmp_path, **options), train_dataset=examples("bert"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again.model, "bert"), expected)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"query.lora_B": None}, BaseMismatchError, "query.lora_B.weight BertForSequenceClassification"),
        ({"query.lora_A": "nothing.lora_A"}, BaseMismatchError, "nothing.lora_A.weight BertForSequenceClassification"),
        ({"classifier": None}, BaseMismatchError, "base_model.model.classifier BertForSequenceClassification"),
    ],
)
def test_a_lora_that_lacks_tensors_or_has_others_is_refused(changes, error, named, model_path, tmp_path):
    classifier = prepared("bert", model_path, method="lora", rank=2)
    path = save_classifier(classifier, tmp_path, {})
    [(old, new)] = changes.items()
    tensors = load_file(path)
    name = next(name for name in tensors if old in name)
    tensor = tensors.pop(name)
    if new is not None:
        tensors[name.replace(old, new)] = tensor
    save_file(tensors, path)
    with raises(error, path.name, *named.split()):
        load_classifier(tmp_path)
    path.write_bytes(b"broken")
    with raises(AdapterFormatError, path.name):
        load_classifier(tmp_path)


def test_a_pickled_base_is_not_read(model_path, tmp_path):
    shutil.copytree(model_path("bert"), tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with raises(ConfigError, str(tmp_path / "pickled"), "safetensors", "pickles"):
        prepared("bert", lambda _: tmp_path / "pickled", method="lora")


@pytest.mark.parametrize("method", ["cersa", "svft", "lora", "pissa", "full"])
@pytest.mark.parametrize("name", ["vit", "deberta-v3"])
def test_bf16_trains_float32_parameters_and_opens_to_the_same_logits(name, method, model_path, tmp_path):
    classifier = prepared(name, model_path, method=method, compute_dtype=torch.bfloat16, **OPTIONS[method])
    exact = prepared(name, model_path, method=method, **OPTIONS[method]).model.state_dict()
    own = {key: p for key, p in classifier.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(parameter, exact[key]) for key, parameter in own.items())
    rate = RATES.get(method, 1e-2)
    trainer = ClassifierTrainer(classifier, args=arguments(tmp_path, learning_rate=rate, bf16=True), train_dataset=examples(name))
    trainer.train()
    parameters = list(classifier.model.parameters())
    assert all(p.dtype == torch.float32 for p in parameters if p.requires_grad)
    assert method == "full" or {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}
    trainer.save_model(str(tmp_path / "result"))
    model, _ = load_classifier(tmp_path / "result")
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(classifier.model, name)
    assert (logits(model, name) - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("method", ["cersa", "svfit", "svft", "full"])
@pytest.mark.parametrize("name", ["vit", "deberta-v2", "deberta-v3"])
def test_the_stock_trainer_saves_a_stock_model(name, method, model_path, tmp_path):
    """`Trainer.save_model` of transformers itself: dense weights that `from_pretrained` reads to the same logits."""
    classifier = prepared(name, model_path, method=method, **OPTIONS[method])
    own = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=DEVICE.type == "cpu", max_steps=2, disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(classifier.model, own, train_dataset=examples(name))
    trainer.train()
    trainer.save_model(str(tmp_path / "stock"))
    auto = AutoModelForImageClassification if name == "vit" else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    expected = logits(classifier.model, name)
    assert (logits(model, name) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_losses_are_those_of_plain_peft_code(method, model_path, tmp_path):
    own = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}[method]
    shared = {"lr_scheduler_type": "linear", "warmup_steps": 0.08, "logging_steps": 1, "max_steps": 10, "weight_decay": 0.01}
    classifier = prepared("bert", model_path, method=method, rank=4)
    ours = ClassifierTrainer(classifier, args=arguments(tmp_path / "ours", **shared), train_dataset=examples("bert"))
    ours.train()

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_path("bert"), num_labels=3)
    set_seed(0)
    # The checkpoint has no pooler, so it is new and trained like the classifier.
    wrapped = ["classifier", "bert.pooler.dense"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["query", "key", "value"], modules_to_save=wrapped, **own)
    model = get_peft_model(model, config)
    settings = TrainingArguments(
        str(tmp_path / "plain"),
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        use_cpu=DEVICE.type == "cpu",
        disable_tqdm=True,
        **shared,
    )
    plain = Trainer(model, settings, train_dataset=examples("bert"))
    plain.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, plain)]
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_adapter_file_and_the_head_load_into_a_stock_model_by_hand(model_path, tmp_path):
    classifier = prepared("roberta", model_path, method="cersa")
    trainer = ClassifierTrainer(classifier, args=arguments(tmp_path), train_dataset=examples("roberta"))
    trainer.train()
    trainer.save_model(str(tmp_path / "result"))
    model = AutoModelForSequenceClassification.from_pretrained(model_path("roberta"), num_labels=3)
    cersa.load_adapter(model, tmp_path / "result" / "pytorch_cersa_weights.safetensors")
    load_head(model, tmp_path / "result" / "head.safetensors")
    expected = logits(classifier.model, "roberta")
    assert (logits(model, "roberta") - expected).norm() <= 5e-3 * expected.norm()
    other = AutoModelForSequenceClassification.from_pretrained(model_path("roberta"), num_labels=2)
    with raises(ConfigError, "head.safetensors", "classifier.out_proj.bias", "(3,)"):
        load_head(other, tmp_path / "result" / "head.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.fc1", "mlp.fc2"]),
        ("bert", ["query", "key", "value", "attention.output.dense", "intermediate.dense", r"(?<=[01]\.)output.dense"]),
        ("roberta", ["query", "key", "value", "attention.output.dense", "intermediate.dense", r"(?<=[01]\.)output.dense"]),
        (
            "deberta-v2",
            ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", r"(?<=[01]\.)output.dense"],
        ),
    ],
)
def test_presets_name_the_layers_of_the_paper(name, expected, model_path):
    model = prepared(name, model_path, method="full").model
    kinds = {"QV": [0, 2], "QKV": [0, 1, 2], "QKVP": [0, 1, 2, 3], "all": range(6)}
    for preset, chosen in kinds.items():
        found = match_targets(model, target_pattern(name, [preset]))
        wanted = re.compile(rf".*layers?\.[01]\..*(?:{'|'.join(expected[i] for i in chosen)})")
        linear = [layer for layer, module in model.named_modules() if type(module) is torch.nn.Linear]
        assert set(found) == {layer for layer in linear if wanted.fullmatch(layer)}
        assert len(found) == 2 * len(chosen)


def test_only_the_targets_and_the_head_are_trained(model_path):
    for name in ARCHITECTURES:
        classifier = prepared(name, model_path, method="cersa")
        names = [n for n, p in classifier.model.named_parameters() if p.requires_grad]
        kinds = LAYERS["deberta-v2" if name == "deberta-v3" else name]
        inside = [n for n in names if not any(n.startswith(f"{head}.") for head in classifier.head)]
        assert len(inside) == 6 and all(re.search("|".join(kinds[k] for k in "QKV"), n) for n in inside)
    # DeBERTa's checkpoints have no pooler: it is new, and so a part of the head.
    assert set(classifier.head) == {"pooler", "classifier"}


def test_full_fine_tuning_trains_everything_unless_layers_are_named(model_path):
    model = prepared("vit", model_path, method="full").model
    assert all(p.requires_grad for p in model.parameters())
    model = prepared("vit", model_path, method="full", target_modules=["QV"]).model
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 + 2 and all(n.endswith(("q_proj.weight", "v_proj.weight")) or "classifier" in n for n in trained)


def test_the_head_starts_the_same_for_every_method(model_path):
    classifiers = [prepared("deberta-v3", model_path, method=method, **own) for method, own in OPTIONS.items()]
    heads = [head_state(classifier.model, classifier.head) for classifier in classifiers]
    assert all(torch.equal(head[name], heads[0][name]) for head in heads for name in heads[0])


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "deberta-v3"])
def test_dropouts_reach_the_model(name, model_path):
    model = prepared(name, model_path, method="lora", rank=4, attention_dropout=0.25, classifier_dropout=0.125).model
    found = {key: module.p for key, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert {p for key, p in found.items() if key.endswith("attention.self.dropout")} == {0.25}
    head = {"roberta": "classifier.dropout"}.get(name, "dropout")
    assert found[head] == 0.125


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_modules": ["classifier"]}, ("target_modules", "['classifier']")),
        ({"target_modules": ["nothing"]}, ("target_modules=['nothing']", "ViTForImageClassification", "'classifier'")),
        ({"method": "pissa", "rank": 25}, ("rank", "25", "24", "PiSSA")),
        ({"classifier_dropout": 0.1}, ("classifier_dropout", "'vit'")),
        ({"attention_dropout": 1.0}, ("attention_dropout", "1.0", "[0, 1)")),
        ({"classifier_learning_rate": 0.0}, ("classifier_learning_rate", "0.0")),
        ({"memory_budget": "1MB", "method": "lora"}, ("memory_budget", "'lora'")),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, named, model_path):
    with raises(ConfigError, *named):
        prepared("vit", model_path, **{"method": "cersa"} | changes)
