"""What an analysis writes: a CSV file of its figures and a picture of them."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.text import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Output:
    """The folder of an analysis; made, and matplotlib looked for, before anything is computed.

    Args:
        folder: made if need be.
        name: of the files, without an ending.

    Raises:
        ConfigError: the folder cannot be made, or matplotlib is not installed.
    """

    def __init__(self, folder: str | os.PathLike, name: str):
        if find_spec("matplotlib") is None:
            raise ConfigError("the pictures need matplotlib, which is not installed: pip install 'cersa-diffusion[plot]'")
        self.folder, self.name = Path(folder), name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {folder}: no folder can be made there ({error.strerror}): choose another") from error

    def path(self, ending: str) -> Path:
        """A file of this analysis, by its ending (".csv", "-layers.csv")."""
        return self.folder / f"{self.name}{ending}"

    def csv(self, rows: Sequence[Mapping[str, object]], ending: str = ".csv") -> Path:
        """Writes rows of the same columns.

        Args:
            rows: at least one; the first names the columns.
            ending: of the file name.
        """
        path = self.path(ending)
        path.write_text(csv_text(rows), encoding="utf-8", newline="")
        return path

    def picture(self, figure: "Figure", ending: str = ".png") -> Path:
        """Writes a picture.

        Args:
            figure: of `new_figure`.
            ending: of the file name.
        """
        path = self.path(ending)
        figure.savefig(path, dpi=100)
        return path


def new_figure(width: float, height: float, title: str = "") -> "Figure":
    """An empty figure that is drawn without a window.

    Args:
        width, height: in inches, of 100 pixels each.
        title: above everything.
    """
    # Imported here: an extra, and slow.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def text_of(rows: Sequence[Mapping[str, object]], formats: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of some columns, for `cersa_diffusion.text.table`.

    Args:
        rows: of the same columns.
        formats: column -> format specification; these columns are shown, in this order. None comes out as a dash.
    """
    cells = [["-" if row[column] is None else format(row[column], how) for column, how in formats.items()] for row in rows]
    return list(formats), cells
