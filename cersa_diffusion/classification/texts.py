"""Reads sentences from files and data sets and prepares the tokens that a model takes."""

from datasets import Dataset

from cersa_diffusion.classification.data import LABELS, Splits, load_named, make_splits, read_file
from cersa_diffusion.classification.settings import TextData
from cersa_diffusion.classification.tasks import GLUE_TASKS
from cersa_diffusion.errors import ConfigError

# Default limit on the tokens of an input.
LONGEST = 512


def metric_name(settings: TextData) -> str:
    """The key in `METRICS`: the metric of the GLUE task, or without a task "accuracy", or "pearson" for a regression."""
    if settings.task_name:
        return GLUE_TASKS[settings.task_name].metric
    return "pearson" if settings.regression else "accuracy"


def text_columns(settings: TextData) -> list[str]:
    """The column with the sentences, and the column with the second sentences if there is one."""
    task = GLUE_TASKS.get(settings.task_name)
    text = settings.text_column or (task.text if task else "text")
    pair = settings.text_pair_column or (task.pair if task else None)
    return [text] if pair is None else [text, pair]


def load_texts(settings: TextData, seed: int) -> Splits:
    """Loads the sentences of a run into the columns of `text_columns` and checks that every example has them.

    Raises:
        ConfigError: the source or the labels (see `number_labels`) cannot be used, or examples have no sentence.
    """
    task = GLUE_TASKS.get(settings.task_name)
    if settings.train_file:
        train = read_file(settings.train_file, "train_file")
        files = settings.validation_file or []
        names = [f"validation_{number}" for number in range(len(files))] if len(files) > 1 else ["validation"]
        if task and len(files) == len(task.validation):
            names = task.validation
        loaded = train, {name: read_file(path, "validation_file") for name, path in zip(names, files, strict=False)}
    else:
        loaded = load_named(settings, task.validation if task else None)
    columns = text_columns(settings)

    def check_holds_texts(rows: Dataset, split: str) -> None:
        for column in columns:
            missing = [number for number, text in enumerate(rows[column]) if not isinstance(text, str)]
            if missing:
                count = f"{len(missing)} of {len(rows)} examples"
                raise ConfigError(f"{split}: {count} have no text in {column!r}, e.g. number {missing[0]}")

    columns_of = dict(zip(("text_column", "text_pair_column"), columns, strict=False)) | {"label_column": settings.label_column}
    regression = settings.regression or metric_name(settings) == "pearson"
    return make_splits(loaded, settings, seed, columns=columns_of, check=check_holds_texts, regression=regression)


def token_limit(max_length: int | None, tokenizer, config) -> int:
    """The number of tokens after which inputs are cut.

    Args:
        max_length: the requested limit; None: as many tokens as the model takes, at most `LONGEST`.
        tokenizer: the tokenizer of the model.
        config: the configuration of the model.

    Raises:
        ConfigError: `max_length` is larger than the model allows.
    """
    # The positions of RoBERTa start after the index of the padding token.
    reserved = (config.pad_token_id or 0) + 1 if config.model_type == "roberta" else 0
    # Models with relative positions only have no largest position.
    absolute = getattr(config, "position_biased_input", True)
    limit = min(config.max_position_embeddings - reserved, tokenizer.model_max_length) if absolute else tokenizer.model_max_length
    if max_length is None:
        return min(limit, LONGEST)
    if max_length > limit:
        raise ConfigError(f"max_length is {max_length}, but the model takes at most {limit} tokens")
    return max_length


def with_tokens(splits: Splits, tokenizer, columns: list[str], max_length: int) -> Splits:
    """Tokenises the splits; only the inputs of the model and the labels remain as columns.

    Args:
        splits: what `load_texts` returned.
        tokenizer: the tokenizer of the model.
        columns: what `text_columns` returned.
        max_length: longer inputs are cut to this many tokens.
    """

    def tokenize(batch: dict) -> dict:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

    def tokenize_rows(rows: Dataset) -> Dataset:
        other_columns = [column for column in rows.column_names if column != LABELS]
        return rows.map(tokenize, batched=True, remove_columns=other_columns, desc="tokens")

    return splits.map(tokenize_rows)
