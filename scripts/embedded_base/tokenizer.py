"""Stage "tokenizer": a byte-pair tokenizer in CLIP's format, over the names and keywords of all emoji."""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .names import all_emoji
from .settings import BOS_TOKEN, COLOURS, CONTEXT_LENGTH, EOS_TOKEN, VOCABULARY_SIZE, Folders

WORD_END = "</w>"
# Words of the captions' templates, and the rare word that stands for a new subject: each becomes one token.
FRAME = "a an emoji of on background twemoji sks"
FRAME_WEIGHT = 100


def train_tokenizer(folders: Folders) -> None:
    """Learn the merges and write the tokenizer, unless it is there.

    Any text can be encoded, because every byte is a token. The two special tokens come last, so that the pooled
    position is the same whether it is looked up by id or by the largest id.

    Args:
        folders: Where the build works.
    """
    if (folders.tokenizer / "tokenizer_config.json").exists():
        return
    texts = [f"{item.name} {' '.join(item.keywords)}" for item in all_emoji(folders)]
    texts += [FRAME, *COLOURS] * FRAME_WEIGHT
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    raw = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    raw.train_from_iterator(texts, trainer)
    letters = alphabet + [letter + WORD_END for letter in alphabet]
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY_SIZE - len(letters) - 2]
    tokens = [*letters, *("".join(pair) for pair in merges), BOS_TOKEN, EOS_TOKEN]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token=EOS_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.save_pretrained(folders.tokenizer)
    tokenizer.backend_tokenizer.model.save(str(folders.tokenizer))


def load_tokenizer(folders: Folders) -> CLIPTokenizer:
    """The tokenizer of all text encoders.

    Args:
        folders: Where the build works.
    """
    return CLIPTokenizer.from_pretrained(folders.tokenizer)
