"""The hyper-parameters of the paper as defaults of the command line: `--preset vit-large/dtd`.

The tables give no number of epochs for pictures; Figure 9 uses 15.
"""

from cersa_diffusion.errors import ConfigError

_PICTURES = ("cifar-100", "eurosat", "resisc45", "stanford-cars", "fgvc-aircraft", "dtd", "cifar-10", "oxford-pets")
_PICTURE_OPTIONS = {
    "attention_dropout": (0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 0.0),
    "weight_decay": (1e-3, 1e-3, 1e-3, 0.01, 1e-3, 1e-3, 1e-3, 0.01),
    "per_device_train_batch_size": (32,) * 8,
}
_TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")

# Table of the paper -> its model, its columns, and its rows by the name of the option.
TABLES: dict[str, tuple[str, tuple[str, ...], dict[str, tuple]]] = {
    "Table 11": (
        "vit-large",
        _PICTURES,
        _PICTURE_OPTIONS
        | {
            "learning_rate": (1e-4, 8e-5, 1e-3, 1e-3, 2e-3, 3e-4, 1e-4, 1e-4),
            "classifier_learning_rate": (1e-3, 5e-4, 3e-3, 3e-3, 6e-3, 1e-3, 1e-3, 1e-3),
        },
    ),
    "Table 12": (
        "vit-base",
        _PICTURES,
        _PICTURE_OPTIONS
        | {
            "learning_rate": (2e-4, 1e-4, 2e-3, 2e-3, 1e-3, 2e-4, 2e-4, 2e-4),
            "classifier_learning_rate": (1e-3, 5e-4, 5e-3, 5e-3, 5e-3, 1e-3, 1e-3, 1e-3),
        },
    ),
    "Table 13": (
        "deberta-v3-base",
        _TASKS,
        {
            "max_length": (256, 128, 320, 64, 512, 320, 320, 128),
            "num_train_epochs": (8, 16, 30, 15, 10, 8, 20, 15),
            "per_device_train_batch_size": (16, 32, 16, 16, 32, 16, 16, 32),
            "classifier_dropout": (0.15, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.2),
            "weight_decay": (0.0, 0.01, 0.01, 0.0, 0.01, 0.01, 0.01, 0.1),
            "learning_rate": (1e-4, 1e-4, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
            "classifier_learning_rate": (3e-4, 3e-4, 4e-4, 3e-4, 3e-4, 3e-4, 4e-4, 4e-4),
            "task_name": _TASKS,
        },
    ),
}


def preset_names(models: tuple[str, ...]) -> list[str]:
    """The names of the presets of these models ("vit-large", "vit-base", "deberta-v3-base")."""
    return [f"{model}/{column}" for model, columns, _ in TABLES.values() if model in models for column in columns]


def preset(name: str, models: tuple[str, ...]) -> tuple[dict, str]:
    """The settings of a preset, and the table of the paper that they come from.

    Args:
        name: e.g. "vit-large/dtd".
        models: the models whose presets are offered.

    Raises:
        ConfigError: there is no such preset; the message lists them.
    """
    for table, (model, columns, rows) in TABLES.items():
        for number, column in enumerate(columns):
            if model in models and name == f"{model}/{column}":
                return {option: values[number] for option, values in rows.items()}, table
    raise ConfigError(f"preset is {name!r}, expected one of {', '.join(preset_names(models))}")
