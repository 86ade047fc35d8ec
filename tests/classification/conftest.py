"""Small random models of every architecture, and small data sets, as files."""

import csv
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WORDS = ["the", "cat", "dog", "is", "was", "good", "bad", "very", "not", "tree", "sun", "rain"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
_TEXT = SIZE | {"vocab_size": len(WORDS) + len(SPECIAL), "max_position_embeddings": 40, "pad_token_id": 0}
_DEBERTA = _TEXT | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}


def _base(name: str):
    torch.manual_seed(0)
    if name == "vit":
        return ViTModel(ViTConfig(**SIZE, image_size=16, patch_size=8), add_pooling_layer=False)
    if name == "bert":
        return BertForMaskedLM(BertConfig(**_TEXT))
    if name == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**_TEXT))
    # As the released checkpoints of both versions set it.
    own = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    if name == "deberta-v2":
        own |= {"conv_kernel_size": 3, "conv_act": "gelu"}
    return DebertaV2Model(DebertaV2Config(**_DEBERTA, **own))


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names)


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory):
    """No test writes to the user's cache of data sets."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """Name of an architecture -> folder with a pre-trained model of it, without a classifier."""
    folders: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("models") / name
            _base(name).save_pretrained(folders[name])
            processor = ViTImageProcessor(size={"height": 16, "width": 16}) if name == "vit" else _tokenizer()
            processor.save_pretrained(folders[name])
        return folders[name]

    return path


def sentences(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(sentence, second sentence, label): "yes" where the first says good."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = [WORDS[i] for i in rng.integers(7, len(WORDS), size=rng.integers(3, 8))]
        words.insert(int(rng.integers(len(words))), "bad" if number % 2 else "good")
        rows.append((" ".join(words), " ".join(reversed(words)), "no" if number % 2 else "yes"))
    return rows


def write_table(path: Path, columns: list[str], rows: list[tuple], separator: str = ",") -> Path:
    """Writes a CSV or TSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([columns, *rows])
    return path


def write_pictures(folder: Path, count: int, seed: int, classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """A folder of pictures for every class, that differ in brightness."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = number % len(classes)
        target = folder / classes[place]
        target.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (16, 16, 3)) + 150 * place // (len(classes) - 1)
        Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> tuple[Path, Path]:
    """CSV files to train and to evaluate on."""
    folder = tmp_path_factory.mktemp("sentences")
    columns = ["text", "second", "label"]
    return write_table(folder / "train.csv", columns, sentences(32, 0)), write_table(
        folder / "dev.csv", columns, sentences(16, 1)
    )


@pytest.fixture(scope="session")
def picture_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of pictures to train and to evaluate on."""
    folder = tmp_path_factory.mktemp("pictures")
    return write_pictures(folder / "train", 32, 0), write_pictures(folder / "validation", 16, 1)
