"""The HTML of the page beside the components of Gradio, such as tables of pictures. All texts in it are escaped here."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from cersa_diffusion.pipelines.draw import picture_grid
from gradio_app.comparing import Comparison, Drawn

# Largest side of shown pictures in pixels; downloads have all pixels.
SHOWN_SIZE = 320
SMALL_SIZE = 128


def size_text(size: int) -> str:
    """Bytes as text with a unit."""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def image_tag(picture: Image.Image, description: str) -> str:
    """A picture as an <img> that contains its own data.

    Args:
        picture: RGB.
        description: text for visitors who cannot see the picture.
    """
    shown = picture.copy()
    shown.thumbnail((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    shown.save(stream, "WEBP", lossless=max(shown.size) <= SMALL_SIZE, quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/webp;base64,{data}">'


def comparison_table(
    rows: Sequence[tuple[str, int]],
    headings: Sequence[tuple[str, str]],
    drawn: Mapping[tuple[int, int], Drawn],
    notes: Sequence[str],
) -> str:
    """The table of a comparison with its finished pictures, and with empty cells for the others.

    Args:
        rows: (prompt, seed) of each row.
        headings: title and description of each column.
        drawn: (row, column) -> finished picture.
        notes: text below the pictures of each column, such as the size of its file.
    """
    head = "".join(f'<th scope="col">{html.escape(title)}<small>{html.escape(text)}</small></th>' for title, text in headings)
    body = ""
    for row, (prompt, seed) in enumerate(rows):
        body += f'<tr><th scope="rowgroup" colspan="{len(headings)}">{html.escape(prompt)} <small>seed {seed}</small></th></tr>'
        cells = "".join(
            f"<td>{_cell(drawn.get((row, column)), prompt, seed, title, notes[column])}</td>"
            for column, (title, _) in enumerate(headings)
        )
        body += f"<tr>{cells}</tr>"
    return (
        '<div class="pictures" tabindex="0" role="region" aria-label="Pictures"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(drawn: Drawn | None, prompt: str, seed: int, title: str, note: str) -> str:
    if drawn is None:
        return '<div class="waiting" aria-label="not drawn yet"></div>'
    score = "not scored" if drawn.score is None else f"CLIPScore <b>{drawn.score:.1f}</b>"
    memory = f"{size_text(drawn.memory)} memory"
    caption = "<br>".join([f"{score} · {drawn.seconds:.1f} s", *([html.escape(note)] if note else []), memory])
    picture = image_tag(drawn.picture, f"{prompt}, seed {seed}, by {title}")
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def grid_picture(
    rows: Sequence[tuple[str, int]], headings: Sequence[tuple[str, str]], drawn: Mapping[tuple[int, int], Drawn]
) -> Image.Image:
    """The finished pictures as one picture, with a line for each column of the page, as in the demo.

    Args:
        rows, headings, drawn: as in `comparison_table`.
    """
    size = next(iter(drawn.values())).picture.size
    blank = Image.new("RGB", size, "white")
    lines = {
        # Two columns may have the same title; in the picture their numbers distinguish them.
        f"{number + 1} {_wrap(title)}": [
            drawn[row, number].picture if (row, number) in drawn else blank for row in range(len(rows))
        ]
        for number, (title, _) in enumerate(headings)
    }
    return picture_grid(lines, [f"{prompt} ({seed})" for prompt, seed in rows])


def _wrap(text: str, width: int = 17) -> str:
    return "\n".join(text[start : start + width] for start in range(0, min(len(text), 4 * width), width))


def headings_of(comparison: Comparison, runs: Sequence) -> list[tuple[str, str]]:
    """Title and description of each column of a comparison.

    Args:
        comparison: the settings of the comparison.
        runs: runs of its columns; None for the untouched base.
    """
    headings = []
    for name, run in zip(comparison.columns, runs, strict=True):
        if run is None:
            headings.append((name, comparison.base))
            continue
        strength = comparison.strengths.get(name, 1.0)
        description = [run.method, *([f"strength {strength:g}"] if run.has_strength and strength != 1 else [])]
        description += [f"{size_text(run.training_bytes)} in training"] if run.training_bytes else []
        headings.append((name, ", ".join(description)))
    return headings


def previews_strip(previews: Sequence[tuple[int, Sequence[Image.Image]]]) -> str:
    """The previews of a training, with a block for each step after which previews were drawn.

    Args:
        previews: (number of finished steps, pictures).
    """
    lines = [
        '<figure class="preview">'
        + "".join(image_tag(picture, f"preview {number + 1} after step {step}") for number, picture in enumerate(pictures))
        + f"<figcaption>step {step}</figcaption></figure>"
        for step, pictures in previews
    ]
    return f'<div class="previews">{"".join(lines)}</div>' if lines else ""
