"""Text for people: tables, sizes, and error messages in one line."""

import csv
import io
from collections.abc import Mapping, Sequence


def mib(size: int) -> str:
    """Bytes as MiB with two decimals."""
    return f"{size / 2**20:.2f}"


def duration(seconds: float) -> str:
    """A time in hours and minutes, minutes and seconds, or seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def one_line(error: object, limit: int = 200) -> str:
    """The message of an error without line breaks, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """A text table; the first column is aligned to the left and the others to the right.

    Args:
        header: titles of the columns.
        rows: the cells of each row, one for every title.
        markdown: GitHub-flavoured Markdown instead of plain text.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]])
    rule = "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths))
    title, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([title, f"|{rule}|", *body])


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same columns as comma-separated values; the keys of the first row name the columns."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
