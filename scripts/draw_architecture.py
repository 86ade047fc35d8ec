#!/usr/bin/env python
"""Draws the pictures of docs/architecture.md: the rooms with their imports, the way of alpha, the way of an adapter.

Rooms, floors and steps are those of the page's tables, imports and lines those of the code.
"""

import ast
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "cersa_diffusion"
PAGE = REPOSITORY / "docs" / "architecture.md"
IMAGES = REPOSITORY / "docs" / "images"
COLOURS = ("#e8eef7", "#dfeadf", "#f6ecd9", "#f3e1e1")
ROW, GAP = 1.0, 0.35


def read_rooms(page: str) -> dict[str, tuple[int, str]]:
    """Room -> floor and what it holds."""
    return {room: (int(floor), text) for floor, room, text in re.findall(r"^\| (\d+) \| `([\w/]+)` \| (.+) \|$", page, re.M)}


def room_of(module: str, rooms: dict) -> str | None:
    """The room of a module, given by its path without the ending; None for the package itself."""
    return max((room for room in rooms if f"{module}/".startswith(f"{room}/")), key=len, default=None)


def read_imports(rooms: dict) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Room -> the rooms that it imports; and room -> lines of code."""
    imported, lines = {room: set() for room in rooms}, dict.fromkeys(rooms, 0)
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path.relative_to(PACKAGE).with_suffix("").as_posix(), rooms)
        if room is None:
            continue
        lines[room] += len(path.read_text().splitlines())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cersa_diffusion."):
                target = room_of(node.module.removeprefix("cersa_diffusion.").replace(".", "/"), rooms)
                if target not in (None, room):
                    imported[room].add(target)
    return imported, lines


def without_detours(imported: dict[str, set[str]], floors: dict[str, int]) -> dict[str, set[str]]:
    """Only the arrows that no chain of others replaces; arrows upwards, for type checkers, are left out."""
    down = {room: {target for target in targets if floors[target] < floors[room]} for room, targets in imported.items()}

    def reached(room: str) -> set[str]:
        return down[room].union(*(reached(target) for target in down[room]))

    return {room: {t for t in targets if not any(t in reached(other) for other in targets)} for room, targets in down.items()}


def draw_rooms(rooms: dict[str, tuple[int, str]]) -> Figure:
    """A row of boxes for every floor, with arrows from a room to those that it imports directly."""
    floors = {room: floor for room, (floor, _) in rooms.items()}
    imported, lines = read_imports(rooms)
    figure = Figure(figsize=(11, 13))
    axes = figure.add_axes((0, 0, 1, 1))
    boxes = {}
    for floor in sorted(set(floors.values())):
        row = [room for room in rooms if floors[room] == floor]
        labels = [f"{room}\n{lines[room]:,} lines" for room in row]
        widths = [max(1.5, 0.16 * len(room) + 0.4) for room in row]
        left = -(sum(widths) + GAP * (len(row) - 1)) / 2
        for room, label, width in zip(row, labels, widths, strict=True):
            boxes[room] = (left, floor * (ROW + GAP), width)
            style = {"boxstyle": "round,pad=0.02", "facecolor": COLOURS[floor % len(COLOURS)], "edgecolor": "#555555"}
            axes.add_patch(FancyBboxPatch((left, floor * (ROW + GAP)), width, 0.8, zorder=2, **style))
            axes.text(left + width / 2, floor * (ROW + GAP) + 0.4, label, ha="center", va="center", fontsize=9, zorder=3)
            left += width + GAP
        axes.text(-6.9, floor * (ROW + GAP) + 0.4, str(floor), color="#999999", va="center")
    for room, targets in without_detours(imported, floors).items():
        for target in targets:
            start = (boxes[room][0] + boxes[room][2] / 2, boxes[room][1])
            end = (boxes[target][0] + boxes[target][2] / 2, boxes[target][1] + 0.82)
            axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#7788aa", lw=0.8, zorder=1))
    axes.set_xlim(-7.2, 7.2)
    axes.set_ylim(-0.3, (max(floors.values()) + 1) * (ROW + GAP))
    axes.axis("off")
    return figure


def draw_way(page: str, title: str) -> Figure:
    """The steps of a section, from the top down."""
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\| (\d+) \| `cersa_diffusion/([\w/.]+)` \| (.+) \|$", section, re.M)
    figure = Figure(figsize=(11, 0.85 * len(steps)))
    axes = figure.add_axes((0, 0, 1, 1))
    for row, (number, path, text) in enumerate(steps):
        y = len(steps) - row - 1
        style = {"boxstyle": "round,pad=0.02", "facecolor": COLOURS[row % len(COLOURS)], "edgecolor": "#555555"}
        axes.add_patch(FancyBboxPatch((0, y), 3.2, 0.6, **style))
        axes.text(0.1, y + 0.3, f"{number}  {path}", va="center", fontsize=10, weight="bold")
        axes.text(3.4, y + 0.3, text.replace("`", ""), va="center", fontsize=9, wrap=True)
        if row:
            axes.annotate("", (1.6, y + 0.64), (1.6, y + 0.98), arrowprops={"arrowstyle": "-|>", "color": "#7788aa"})
    axes.set_xlim(-0.1, 11)
    axes.set_ylim(-0.15, len(steps))
    axes.axis("off")
    return figure


def main() -> None:
    # The same code draws the same file.
    matplotlib.rcParams["svg.hashsalt"] = "architecture"
    page = PAGE.read_text()
    figures = {"rooms": draw_rooms(read_rooms(page)), "alpha": draw_way(page, "The way of alpha")}
    figures["adapter"] = draw_way(page, "The way of an adapter")
    for name, figure in figures.items():
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
