"""The GLUE tasks of the paper (Table 8): their columns, evaluation splits and metric."""

from typing import NamedTuple


class GlueTask(NamedTuple):
    """A task.

    Attributes:
        text: column of the sentences.
        pair: column of the second sentences, or None.
        metric: key of `cersa_diffusion.classification.scores.METRICS`.
        validation: splits to evaluate on.
    """

    text: str
    pair: str | None
    metric: str
    validation: tuple[str, ...] = ("validation",)


GLUE_TASKS = {
    "mnli": GlueTask("premise", "hypothesis", "accuracy", ("validation_matched", "validation_mismatched")),
    "mrpc": GlueTask("sentence1", "sentence2", "accuracy"),
    "stsb": GlueTask("sentence1", "sentence2", "pearson"),
    "rte": GlueTask("sentence1", "sentence2", "accuracy"),
    "sst2": GlueTask("sentence", None, "accuracy"),
    "qnli": GlueTask("question", "sentence", "accuracy"),
    "qqp": GlueTask("question1", "question2", "accuracy"),
    "cola": GlueTask("sentence", None, "matthews"),
}
