"""Writes PNG grids of the pictures side by side, and the report: one HTML file that opens from disk and loads no other file."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from cersa_diffusion.metrics.prompts import without_token
from cersa_diffusion.pictures import load_picture
from cersa_diffusion.pipelines.draw import picture_grid
from cersa_diffusion.study.cells import Cell, write_atomically
from cersa_diffusion.study.definition import SELECTABLE, Study
from cersa_diffusion.study.judging import FIRST_SEED, read_pictures
from cersa_diffusion.study.subjects import TEST, Subject
from cersa_diffusion.study.table import ALL, COSTS, SCORES, SIZES, Figure, Line, Measure, Table, cell
from cersa_diffusion.study.tuning import TUNING_SEED, Choice

# Larger pictures would make the report too large to open.
THUMBNAIL = 160
HELD_BACK = "held back"
DRIFT = "drift"
PLOTTED = ("clipscore", "clip_i", "similarity", "distance", "drift_latent", "diversity_similarity")


@dataclass(frozen=True)
class Gallery:
    """Pictures of a subject to show side by side, all from the same seed.

    Args:
        subject: name of the subject.
        title: the kind of prompts.
        prompts: the columns.
        rows: label -> a picture for each prompt, or None if there is none.
    """

    subject: str
    title: str
    prompts: Sequence[str]
    rows: Mapping[str, Sequence[Image.Image | None]]


def galleries(study: Study, subjects: Mapping[str, Subject], choices: Mapping[str, Choice], output: Path) -> list[Gallery]:
    """The galleries of every subject: test prompts, then drift prompts; all with the first training seed and the first noise."""
    result = []
    for name, subject in subjects.items():
        test = subject.parts[TEST]
        prompt_sets = [("prompts with the subject", TEST, test.prompts)]
        if subject.drift_prompts:
            prompt_sets.append(("prompts without the subject", DRIFT, subject.drift_prompts))
        for title, part, prompts in prompt_sets:
            rows = {}
            if part == TEST and test.held_back:
                rows[HELD_BACK] = [load_picture(test.held_back[p]) if p in test.held_back else None for p in prompts]
            for row in study.rows:
                cell_of_row = Cell(name, row.name, choices[row.name].rate, TUNING_SEED) if row.trained else Cell(name, row.name)
                # A training that diverged has drawn no pictures.
                folder = cell_of_row.pictures(output, part)
                pictures = read_pictures(folder) if folder.is_dir() else {}
                rows[row.name] = [pictures.get(f"{i:03d}-seed{FIRST_SEED[part]}.png") for i in range(len(prompts))]
            result.append(Gallery(name, title, [without_token(p, study.unique_token) for p in prompts], rows))
    return result


def write_grids(shown: Sequence[Gallery], output: Path) -> list[Path]:
    """Writes each gallery as one PNG, methods by prompts; returns the files."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    paths = []
    for gallery in shown:
        size = next(picture.size for pictures in gallery.rows.values() for picture in pictures if picture)
        blank = Image.new("RGB", size, "white")
        rows = {label: [picture or blank for picture in pictures] for label, pictures in gallery.rows.items()}
        paths.append(folder / f"{gallery.subject}-{gallery.title.replace(' ', '-')}.png")
        picture_grid(rows, list(gallery.prompts)).save(paths[-1])
    return paths


def write_report(
    study: Study, subjects: Mapping[str, Subject], choices: Mapping[str, Choice], table: Table, output: Path
) -> None:
    """Writes the PNG grids and report.html into the folder of the comparison."""
    shown = galleries(study, subjects, choices, output)
    grids = [str(path.relative_to(output)) for path in write_grids(shown, output)]
    environment = Environment(
        loader=PackageLoader("cersa_diffusion.study", "."), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"cell": cell, "data_uri": data_uri, "strip": strip}
    scores = table.measured(SCORES)
    html = environment.get_template("report.html.jinja").render(
        study=study,
        subjects=subjects,
        table=table,
        choices=choices,
        better="higher" if SELECTABLE[study.select_by] else "lower",
        score_columns=scores,
        cost_columns=table.measured((*SIZES, *COSTS)),
        plotted=[measure for measure in scores if measure.name in PLOTTED],
        all=ALL,
        galleries=list(zip(shown, grids, strict=True)),
        settings=json.dumps({k: v for k, v in study.to_dict().items() if k != "root"}, indent=2, ensure_ascii=False),
    )
    write_atomically(output / "report.html", html + "\n")


def strip(table: Table, measure: Measure) -> dict:
    """The data of a strip plot: the ends of the axis, and for each row the positions of its mean and of its cells in percent."""
    lines = [line for line in table.of(ALL) if measure.name in line.figures]
    values = [value for line in lines for value in line.figures[measure.name].values]
    low, high = min(values), max(values)

    def position(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2) if high > low else 50.0

    def points(line: Line) -> dict:
        figure: Figure = line.figures[measure.name]
        return {"row": line.row, "mean": position(figure.mean), "values": [position(value) for value in figure.values]}

    return {"low": f"{low:.{measure.digits}f}", "high": f"{high:.{measure.digits}f}", "lines": [points(line) for line in lines]}


def data_uri(picture: Image.Image) -> str:
    """The picture as a data URI for the HTML, in the size of a thumbnail."""
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
