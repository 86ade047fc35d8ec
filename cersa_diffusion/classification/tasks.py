"""The GLUE tasks of the paper (Table 8) with their columns, evaluation splits and metrics."""

from typing import NamedTuple


class GlueTask(NamedTuple):
    """A task.

    Attributes:
        text: column with the sentences.
        pair: column with the second sentences, or None.
        metric: key in `cersa_diffusion.classification.scores.METRICS`.
        validation: the splits to evaluate on.
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
