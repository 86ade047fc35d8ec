"""Sentences: from files and data sets to the tokens that a model takes."""

from datasets import Dataset

from cersa_diffusion.classification.data import LABELS, Splits, check_columns, hold_back, load_named, number_labels, read_file
from cersa_diffusion.classification.settings import TextData
from cersa_diffusion.classification.tasks import GLUE_TASKS
from cersa_diffusion.errors import ConfigError

LONGEST = 512


def metric_name(settings: TextData) -> str:
    """Key of `METRICS` for the task, or for data of one's own: accuracy, or Pearson's correlation of numbers."""
    if settings.task_name:
        return GLUE_TASKS[settings.task_name].metric
    return "pearson" if settings.regression else "accuracy"


def text_columns(settings: TextData) -> list[str]:
    """The column of the sentences and, where there is one, that of the second sentences."""
    task = GLUE_TASKS.get(settings.task_name)
    text = settings.text_column or (task.text if task else "text")
    pair = settings.text_pair_column or (task.pair if task else None)
    return [text] if pair is None else [text, pair]


def load_texts(settings: TextData, seed: int) -> Splits:
    """The sentences of a run, checked, with the columns of `text_columns`.

    Raises:
        ConfigError: a source that cannot be used, labels that cannot (see `number_labels`), or examples without a sentence.
    """
    if settings.train_file:
        train = read_file(settings.train_file, "train_file")
        files = settings.validation_file or []
        names = [f"validation_{number}" for number in range(len(files))] if len(files) > 1 else ["validation"]
        if settings.task_name and len(files) == len(GLUE_TASKS[settings.task_name].validation):
            names = list(GLUE_TASKS[settings.task_name].validation)
        validation = {name: read_file(path, "validation_file") for name, path in zip(names, files, strict=False)}
    else:
        task = GLUE_TASKS.get(settings.task_name)
        train, validation = load_named(settings, task.validation if task else None)
    columns = text_columns(settings)
    named = dict(zip(("text_column", "text_pair_column"), columns, strict=False)) | {"label_column": settings.label_column}
    check_columns({"train": train, **validation}, named)
    for name, rows in {"train": train, **validation}.items():
        _check_texts(rows, columns, name)
    train, validation = hold_back(train, validation, settings, seed)
    regression = settings.regression or metric_name(settings) == "pearson"
    return Splits(*number_labels(train, validation, settings.label_column, regression=regression))


def _check_texts(rows: Dataset, columns: list[str], split: str) -> None:
    for column in columns:
        missing = [number for number, text in enumerate(rows[column]) if not isinstance(text, str)]
        if missing:
            raise ConfigError(
                f"{split}: {len(missing)} of {len(rows)} examples have no text in {column!r}, e.g. number {missing[0]}"
            )


def token_limit(max_length: int | None, tokenizer, config) -> int:
    """The number of tokens that inputs are cut to.

    Args:
        max_length: what was asked for.
        tokenizer: of the model.
        config: of the model.

    Raises:
        ConfigError: more than the model has positions for.
    """
    # RoBERTa counts its positions from the one after the padding token.
    taken = (config.pad_token_id or 0) + 1 if config.model_type == "roberta" else 0
    # Relative positions have no end.
    absolute = getattr(config, "position_biased_input", True)
    most = min(config.max_position_embeddings - taken, tokenizer.model_max_length) if absolute else tokenizer.model_max_length
    if max_length is None:
        return min(most, LONGEST)
    if max_length > most:
        raise ConfigError(f"max_length is {max_length}, but the model takes at most {most} tokens")
    return max_length


def with_tokens(splits: Splits, tokenizer, columns: list[str], max_length: int) -> Splits:
    """The splits with the inputs of the model and the labels only.

    Args:
        splits: with the columns of the sentences.
        tokenizer: of the model.
        columns: those of `text_columns`.
        max_length: longer inputs are cut to this many tokens.
    """

    def tokens(batch: dict) -> dict:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

    def change(rows: Dataset) -> Dataset:
        others = [column for column in rows.column_names if column != LABELS]
        return rows.map(tokens, batched=True, remove_columns=others, desc="tokens")

    return splits.map(change)
