"""Model cards: what the models are, how they were made, and what came out, with measured figures only."""

import json
from pathlib import Path

from .diffusion import first_course
from .licences import artwork_table
from .settings import Artwork, Folders

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
            **report_fields(folders, ("autoencoder", "diffusion", "evaluation")),
            first=first_course_text(folders),
            artwork=artwork_table(),
            curve=loss_table(folders, "diffusion"),
            verdict=remark(folders, "verdict"),
            spectra=spectra,
            vocabulary=folders.vocabulary,
            name_count=len(names),
            names=", ".join(names),
        )
    )
    (folders.base / "README.md").write_text(card)


def first_course_text(folders: Folders) -> str:
    """The rows of the training table that come before the vocabulary's own.

    Args:
        folders: Where the build works.
    """
    first = first_course(folders)
    text = read_report(first, "text")
    rows = [
        f"| text encoder, guessing the main components of the latents | {text['samples']} | {text['batch_size']} "
        f"| {text['minutes']:.1f} | squared error {text['loss']:.3f} of 1 |"
    ]
    if first != folders:
        report = read_report(first, "diffusion")
        rows.append(
            f"| denoiser and text encoder, vocabulary `{first.vocabulary}` ({report['pictures']} pictures) | {report['samples']} "
            f"| {report['batch_size']} | {report['minutes']:.1f} | weighted v-error {report['loss']:.3f} |"
        )
    return "\n".join(rows)


def write_vit_card(folders: Folders) -> None:
    """Write the card of the vision transformer.

    Args:
        folders: Where the build works.
    """
    fields = report_fields(folders, ("vit",)) | {"artwork": artwork_table(), "curve": loss_table(folders, "vit")}
    (folders.vit / "README.md").write_text((PARTS / "vit.md").read_text().format(**fields))


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
            vocabulary=folders.vocabulary,
            name_count=len(names),
        )
    )
    (folders.clip / "README.md").write_text(card)


def subject_card(name: str, word: str, artwork: Artwork, look: str) -> str:
    """The card of a subject.

    Args:
        name: Name of its folder.
        word: Its class.
        artwork: The set it is from.
        look: Words of its captions for the look.
    """
    knows = "other pictures in this look" if artwork.style else "no picture in this look"
    return (
        (PARTS / "subject.md")
        .read_text()
        .format(name=name, word=word, title=artwork.title, source=artwork.source, licence=artwork.licence, look=look, knows=knows)
    )
