"""Sources and labels: what is read, and what is refused before any work."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from transformers import DebertaV2Config

from cersa_diffusion import ConfigError
from cersa_diffusion.classification import ClassifierSettings, ImageData, TextData
from cersa_diffusion.classification.data import number_labels
from cersa_diffusion.classification.images import load_images
from cersa_diffusion.classification.model import load_processor
from cersa_diffusion.classification.texts import load_texts, text_columns, token_limit

from ..conftest import raises
from .conftest import WORDS, sentences, write_pictures, write_table


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["b", "a", "c d", "10", "9"]), min_size=2, max_size=20).filter(lambda own: len(set(own)) > 1))
def test_classes_are_numbered_from_zero_and_the_names_give_the_labels_back(labels):
    train, validation, names = number_labels(
        Dataset.from_dict({"label": labels}), {"v": Dataset.from_dict({"label": labels[:1]})}, "label", regression=False
    )
    assert [names[number] for number in train["labels"]] == labels
    assert names[validation["v"]["labels"][0]] == labels[0]
    assert sorted(set(train["labels"])) == list(range(len(names)))


def test_numbers_keep_their_order_and_may_have_gaps():
    train, _, names = number_labels(Dataset.from_dict({"label": [10, 2, 10, 3]}), {}, "label", regression=False)
    assert names == ["2", "3", "10"] and train["labels"][:] == [2, 0, 2, 1]


def test_minus_one_is_a_label_among_others():
    rows = Dataset.from_dict({"label": [-1, 1, 0]})
    assert number_labels(rows, {}, "label", regression=False)[2] == ["-1", "0", "1"]
    assert number_labels(rows, {}, "label", regression=True)[0]["labels"][:] == [-1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("train", "validation", "regression", "named"),
    [
        (["a", "a"], ["a"], False, ("train", "2", "'a'")),
        ([0, 1], [2], False, ("validation", "['2']", "['0', '1']")),
        ([0.5, 1.0], [1.0], False, ("label_column", "0.5", "--regression")),
        (["a", "b"], ["a"], True, ("label_column", "'a'", "regression")),
        ([0, 1, -1], [-1, -1], False, ("validation", "label", "2 of 2", "number 0")),
        (["a", None], ["a"], False, ("train", "label", "1 of 2", "number 1")),
    ],
)
def test_labels_that_cannot_work_are_refused(train, validation, regression, named):
    splits = {"validation": Dataset.from_dict({"label": validation})}
    with raises(ConfigError, *named):
        number_labels(Dataset.from_dict({"label": train}), splits, "label", regression=regression)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_files_of_all_kinds_give_the_same_examples(suffix, tmp_path):
    columns, rows = ["text", "second", "label"], sentences(12, 0)
    path = tmp_path / f"train.{suffix}"
    if suffix in ("csv", "tsv"):
        write_table(path, columns, rows, "," if suffix == "csv" else "\t")
    else:
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        path.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    splits = load_texts(TextData(train_file=str(path), validation_fraction=0.25), seed=0)
    assert len(splits.train) == 9 and len(splits.validation["validation"]) == 3 and splits.label_names == ["no", "yes"]
    found = {(row["text"], splits.label_names[row["labels"]]) for row in [*splits.train, *splits.validation["validation"]]}
    assert found == {(text, label) for text, _, label in rows}


def test_quotation_marks_in_tsv_and_words_that_look_missing_are_text(tmp_path):
    path, lines = tmp_path / "train.tsv", ['"it begins', "null", 'and ends"', 'a "b" c']
    path.write_text(
        "text\tlabel\n" + "".join(f"{line}\t{label}\n" for line, label in zip(lines, ["NA", "None"] * 2, strict=True))
    )
    splits = load_texts(TextData(train_file=str(path), validation_file=[str(path)]), seed=0)
    assert splits.train["text"][:] == lines and splits.label_names == ["NA", "None"]


def test_mnli_from_files_has_both_parts_under_their_names(tmp_path):
    columns, rows = ["premise", "hypothesis", "label"], sentences(12, 0)
    files = [str(write_table(tmp_path / f"{name}.csv", columns, rows)) for name in ("train", "m", "mm")]
    settings = TextData(task_name="mnli", train_file=files[0], validation_file=files[1:])
    splits = load_texts(settings, seed=0)
    assert list(splits.validation) == ["validation_matched", "validation_mismatched"]
    assert text_columns(settings) == ["premise", "hypothesis"]


def test_sts_b_predicts_numbers(tmp_path):
    rows = [("a", "b", value) for value in (0, 2.5, 5)]
    path = str(write_table(tmp_path / "train.csv", ["sentence1", "sentence2", "label"], rows))
    splits = load_texts(TextData(task_name="stsb", train_file=path, validation_file=[path]), seed=0)
    assert splits.label_names is None and splits.train["labels"][:] == [0.0, 2.5, 5.0]


@pytest.mark.parametrize(
    ("content", "changes", "named"),
    [
        ("", {}, ("train_file", "train.csv", "empty")),
        ("sentence,label\na,0\nb,1\n", {}, ("text_column", "train", "'text'", "sentence, label")),
        ("text,class\na,0\nb,1\n", {}, ("label_column", "train", "'label'", "text, class")),
        ("text,label\n,0\nb,1\n", {}, ("train", "1 of 2", "'text'", "number 0")),
        ("text,label\na,0\nb,1\n", {"validation_file": None}, ("validation_file", "validation_dir", "validation_fraction")),
        ("text,label\na,0\nb,1\n", {"validation_file": ["/no/such.csv"]}, ("validation_file", "/no/such.csv")),
        ("text,label\na,0\nb,1\n", {"validation_fraction": 0.5}, ("validation_fraction", "training", "evaluate")),
    ],
)
def test_files_that_cannot_work_are_refused(content, changes, named, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(content)
    with raises(ConfigError, *named):
        load_texts(TextData(**{"train_file": str(path), "validation_file": [str(path)]} | changes), seed=0)


def test_a_table_without_rows_is_refused(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n")
    with raises(ConfigError, "train") as caught:
        load_texts(TextData(train_file=str(path), validation_file=[str(path)]), seed=0)
    # One release of datasets reads no rows, another one no table.
    assert any(name in str(caught.value) for name in ("no examples", "CSV"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task_name": "winograd"}, ("task_name", "'winograd'", "mnli, mrpc")),
        ({}, ("dataset_name", "train_file", "none")),
        ({"train_file": "a.csv", "dataset_name": "b"}, ("dataset_name and train_file",)),
        (
            {"dataset_name": "a", "validation_split": "b", "validation_fraction": 0.5},
            ("validation_fraction", "validation_split"),
        ),
        ({"train_file": "a.csv", "validation_fraction": 1.5}, ("validation_fraction", "1.5", "(0, 1)")),
    ],
)
def test_sources_that_contradict_each_other_are_refused(changes, named):
    with raises(ConfigError, *named):
        TextData(**changes)


def test_a_data_set_on_disk_and_its_missing_split(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    splits = load_texts(TextData(dataset_name=str(tmp_path / "set")), seed=0)
    assert list(splits.validation) == ["test"] and splits.train["labels"][:] == [0, 1]
    with raises(ConfigError, "validation_split", str(tmp_path / "set"), "'dev'", "train, test"):
        load_texts(TextData(dataset_name=str(tmp_path / "set"), validation_split="dev"), seed=0)


def test_folders_are_matched_by_the_names_of_the_classes(tmp_path):
    train = write_pictures(tmp_path / "train", 9, 0, ("bright", "dark", "grey"))
    validation = write_pictures(tmp_path / "validation", 4, 0, ("dark", "grey"))
    splits = load_images(ImageData(train_dir=str(train), validation_dir=str(validation)), seed=0)
    assert splits.label_names == ["bright", "dark", "grey"]
    assert sorted(splits.validation["validation"]["labels"]) == [1, 1, 2, 2]


def test_a_data_set_of_pictures_with_its_own_columns(tmp_path):
    paths = sorted(str(path) for path in write_pictures(tmp_path / "pictures", 4, 0).rglob("*.png"))
    rows = Dataset.from_dict({"img": paths, "fine": ["x", "x", "y", "y"]}).cast_column("img", Image())
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "set")
    splits = load_images(ImageData(dataset_name=str(tmp_path / "set"), image_column="img", label_column="fine"), seed=0)
    assert splits.label_names == ["x", "y"] and splits.train.column_names == ["image", "labels"]
    rows = rows.cast_column("fine", Value("string")).rename_column("img", "picture").add_column("img", [1, 2, 3, 4])
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "other")
    with raises(ConfigError, "image_column", "'img'", "train"):
        load_images(ImageData(dataset_name=str(tmp_path / "other"), image_column="img", label_column="fine"), seed=0)


def test_pictures_that_cannot_work_are_refused(tmp_path):
    folder = write_pictures(tmp_path / "train", 6, 0)
    source = {"train_dir": str(folder), "validation_fraction": 0.5}
    (folder / "dark" / "broken.png").write_bytes((folder / "dark" / "0.png").read_bytes()[:100])
    (folder / "light" / "text.jpg").write_text("no picture")
    with raises(ConfigError, "pictures") as caught:
        load_images(ImageData(**source), seed=0)
    # Of whichever split comes first.
    assert any(name in str(caught.value) for name in ("broken.png", "text.jpg"))
    one = write_pictures(tmp_path / "one", 4, 0) / "dark"
    with raises(ConfigError, "train_dir", str(one), "class"):
        load_images(ImageData(train_dir=str(one), validation_fraction=0.5), seed=0)
    lone = tmp_path / "lone"
    lone.mkdir()
    one.rename(lone / "dark")
    with raises(ConfigError, "train", "class", "'dark'"):
        load_images(ImageData(train_dir=str(lone), validation_fraction=0.5), seed=0)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with raises(ConfigError, "train_dir", str(tmp_path / "empty"), ".png"):
        load_images(ImageData(train_dir=str(tmp_path / "empty"), validation_fraction=0.5), seed=0)


def test_the_tokenizer_of_deberta_is_read_as_it_is_released(tmp_path):
    """A sentencepiece model and nothing else."""
    names = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    numbers = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "vocab_size": 26}
    texts = iter([" ".join(WORDS), *(text for text, _, _ in sentences(20, 0))])
    prefix = str(tmp_path / "spm")
    SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=prefix, minloglevel=2, **names, **numbers)
    DebertaV2Config(vocab_size=26).save_pretrained(tmp_path)
    tokenizer = load_processor("text", ClassifierSettings(model_name_or_path=str(tmp_path)))
    found = tokenizer.convert_ids_to_tokens(tokenizer("the cat", "a dog")["input_ids"])
    assert found[0] == "[CLS]" and found.count("[SEP]") == 2 and "".join(found[1:]).replace("\u2581", " ").startswith(" the cat")


def test_inputs_are_cut_to_what_the_model_takes(model_path):
    from transformers import AutoConfig, AutoTokenizer

    limits = {"bert": 40, "roberta": 39, "deberta-v3": 512}
    for name, limit in limits.items():
        config, tokenizer = AutoConfig.from_pretrained(model_path(name)), AutoTokenizer.from_pretrained(model_path(name))
        assert token_limit(None, tokenizer, config) == limit
        assert token_limit(12, tokenizer, config) == 12
    config, tokenizer = AutoConfig.from_pretrained(model_path("bert")), AutoTokenizer.from_pretrained(model_path("bert"))
    with raises(ConfigError, "max_length", "41", "40"):
        token_limit(41, tokenizer, config)


def test_held_back_examples_depend_on_the_seed_alone(text_files):
    def held(seed: int) -> list[str]:
        return load_texts(TextData(train_file=str(text_files[0]), validation_fraction=0.25), seed).validation["validation"][
            "text"
        ][:]

    assert held(0) == held(0) and held(0) != held(1) and len(np.unique(held(0))) == 8
