"""Text for people: tables and sizes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def mib(size: int) -> str:
    """Bytes as MiB with two decimals."""
    return f"{size / 2**20:.2f}"


def text_table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Cells in columns, numbers to the right.

    Args:
        header: titles of the columns.
        rows: as many cells each.
        markdown: GitHub-flavoured Markdown instead of plain text.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]])
    rule = [f"{'-' * (width - 1)}{':' if number else '-'}" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub-flavoured table; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return (
            "| "
            + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
            + " |"
        )

    rule = "|" + "|".join(("-" * (w + 2)) if i == 0 else ("-" * (w + 1) + ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
