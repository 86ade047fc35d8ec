"""The files that an analysis writes, CSV and pictures, and what all analyses need to make them."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.text import csv_text

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# A string, because matplotlib is an optional dependency and slow to import.
Figure: TypeAlias = "matplotlib.figure.Figure"
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


class Output:
    """The output folder of an analysis; it is created, and matplotlib is looked for, before anything is computed.

    Args:
        folder: created if it does not exist.
        name: name of the files, without ending.

    Raises:
        ConfigError: the folder cannot be created, or matplotlib is not installed.
    """

    def __init__(self, folder: str | os.PathLike, name: str):
        if find_spec("matplotlib") is None:
            raise ConfigError("the pictures need matplotlib, which is not installed: pip install 'cersa-diffusion[plot]'")
        self.folder, self.name = Path(folder), name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {folder}: this folder cannot be created ({error.strerror}): choose another") from error

    def path(self, ending: str) -> Path:
        """The file of this analysis with this ending (".csv", "-layers.csv")."""
        return self.folder / f"{self.name}{ending}"

    def csv(self, rows: Sequence[Mapping[str, object]], ending: str = ".csv") -> Path:
        """Writes rows of the same columns; there is at least one, and the first names the columns."""
        path = self.path(ending)
        path.write_text(csv_text(rows), encoding="utf-8", newline="")
        return path

    def picture(self, figure: Figure, ending: str = ".png") -> Path:
        """Writes a figure of `new_figure`."""
        path = self.path(ending)
        figure.savefig(path, dpi=100)
        return path


def new_figure(
    width: float, height: float, title: str = "", *, lines: int = 1, columns: int = 1, **options
) -> tuple[Figure, list["matplotlib.axes.Axes"]]:
    """Creates an empty figure that needs no window.

    Args:
        width, height: size in inches of 100 pixels.
        title: title above all panels.
        lines, columns: number of panels.
        options: further options of `Figure.subplots`.

    Returns:
        The figure, and its panels line by line.
    """
    # Imported here because matplotlib is an optional dependency and slow to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, list(figure.subplots(lines, columns, squeeze=False, **options).flat)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Groups items by a key; the groups are in the order in which their keys first occur."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def check_shares(option: str, values: Sequence[float], kind: str = "shares") -> None:
    """Raises ConfigError if there are no values or one of them lies outside (0, 1]."""
    wrong = [value for value in values if not 0 < value <= 1]
    if wrong or not values:
        raise ConfigError(f"{option}: {wrong[0] if wrong else 'none are given'}, expected {kind} in (0, 1]")


def text_of(rows: Sequence[Mapping[str, object]], formats: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells for `cersa_diffusion.text.table`.

    Args:
        rows: rows of the same columns.
        formats: column -> format specification, for the columns to show in this order; None is shown as a dash.
    """
    cells = [["-" if row[column] is None else format(row[column], how) for column, how in formats.items()] for row in rows]
    return list(formats), cells
