"""Model cards: what the models are, how they were made, and what came out, with measured figures only."""

import json
from pathlib import Path

from .licences import artwork_table
from .settings import Folders

PARTS = Path(__file__).parent / "cards"


def read_report(folders: Folders, stage: str) -> dict[str, float]:
    """What a finished stage measured.

    Args:
        folders: Where the build works.
        stage: Name of the stage.
    """
    return json.loads((folders.stage(stage) / "report.json").read_text())


def loss_table(folders: Folders, stage: str, rows: int = 10) -> str:
    """The loss over the training as a Markdown table; each row is the mean of the logged values up to it.

    Args:
        folders: Where the build works.
        stage: Name of the stage.
        rows: How many rows.
    """
    log = json.loads((folders.stage(stage) / "log.json").read_text())
    lines = ["| step | minutes | loss |", "|---|---|---|"]
    edges = [round(len(log) * (row + 1) / rows) for row in range(rows)]
    for first, last in zip([0, *edges], edges, strict=False):
        part = log[first:last]
        if part:
            loss = sum(entry["loss"] for entry in part) / len(part)
            lines.append(f"| {part[-1]['step']} | {part[-1]['seconds'] / 60:.1f} | {loss:.4f} |")
    return "\n".join(lines)


def report_fields(folders: Folders, stages: tuple[str, ...]) -> dict[str, object]:
    """The figures of stages under names like `clip_minutes`, for the cards' placeholders.

    Args:
        folders: Where the build works.
        stages: Names of the stages.
    """
    return {f"{stage}_{key}": value for stage in stages for key, value in read_report(folders, stage).items()}


def remark(folders: Folders, topic: str) -> str:
    """What a person wrote about the models of this vocabulary after looking at them.

    Args:
        folders: Where the build works.
        topic: First part of the file's name.
    """
    path = PARTS / f"{topic}_{folders.vocabulary}.md"
    return path.read_text().strip() if path.exists() else ""


def write_base_card(folders: Folders, names: list[str], spectra: str) -> None:
    """Write the card of the pipeline.

    Args:
        folders: Where the build works.
        names: What it learned to draw.
        spectra: Table of the spectra.
    """
    card = (
        (PARTS / "base.md")
        .read_text()
        .format(
            **report_fields(folders, ("autoencoder", "text", "diffusion")),
            artwork=artwork_table(),
            curve=loss_table(folders, "diffusion"),
            verdict=remark(folders, "verdict"),
            spectra=spectra,
            vocabulary=folders.vocabulary,
            name_count=len(names),
            names=", ".join(names) if len(names) < 200 else "all names of the Unicode list but flags, families and keycaps",
        )
    )
    (folders.base / "README.md").write_text(card)


def write_clip_card(folders: Folders, names: list[str]) -> None:
    """Write the card of CLIP.

    Args:
        folders: Where the build works.
        names: What it learned to tell apart.
    """
    card = (
        (PARTS / "clip.md")
        .read_text()
        .format(
            **report_fields(folders, ("clip",)),
            artwork=artwork_table(),
            curve=loss_table(folders, "clip"),
            history=remark(folders, "clip_history"),
            vocabulary=folders.vocabulary,
            name_count=len(names),
        )
    )
    (folders.clip / "README.md").write_text(card)


def subject_card() -> str:
    """The card of the cat."""
    return (PARTS / "subject.md").read_text()
