"""Plots that say what they show: of which models, on which machine, in which units; the legend beside the data.

matplotlib is an extra, and is imported where something is drawn. Figures are made without pyplot, which would keep
all of them and look for a screen.
"""

import math
import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .benchmarking import machine_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INSTALL = "plots need matplotlib: pip install matplotlib"
NO_BREAK = "\N{NO-BREAK SPACE}"
MARKERS = "osD^vPX*"
LETTERS, LINE = 12, 0.2  # of text at the size of a title or legend: letters an inch, and inches a line
WHOLE_NAMES = {"break_on_hyphens": False, "break_long_words": False}  # in `textwrap.wrap`
LOG_FROM = 8  # times the smallest value: where the largest is less, a linear axis shows as much
MOST_TICKS = 12  # of a linear axis with a tick for every value


def write(folder: Path, drawings: dict[str, Callable[[], "Figure | None"]]) -> list[str]:
    """Draws into files of a folder; of those that are left out, one line says why.

    An older file of a name that is left out is deleted, since it would show something else.

    Args:
        drawings: {name of the file: what makes its figure, or None where there are no two points to compare}.

    Returns:
        The names of the files that are there now.
    """
    for name in drawings:
        (folder / name).unlink(missing_ok=True)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"Without {', '.join(drawings)}: {INSTALL}")
        return []
    figures = {name: draw() for name, draw in drawings.items()}
    if empty := [name for name, figure in figures.items() if figure is None]:
        print(f"Without {', '.join(empty)}: fewer than two points, with nothing to compare.")
    for name in figures.keys() - empty:
        figures[name].savefig(folder / name, dpi=150, bbox_inches="tight")
    return [name for name in figures if name not in empty]


def title(what: str, models: dict[str, str], machine: dict) -> str:
    """What is shown, of which models ({what it is: folder or Hub id}), on which machine: a line each."""
    of_models = ", ".join(f"{kind} {short(name)}".replace(" ", NO_BREAK) for kind, name in models.items())
    return "\n".join([what, of_models, machine_name(machine)])


def short(name: str) -> str:
    """A Hub id as it is, and of a folder the last two parts of its path."""
    path = Path(os.path.abspath(name)) if Path(name).is_dir() else Path(name)
    return "/".join(path.parts[-2:]).replace("//", "/")


def panels(
    title: str, n: int = 1, columns: int = 3, size: tuple[float, float] = (4.5, 3.5), **options
) -> "tuple[Figure, list[Axes]]":
    """A figure with a title, and n panels in rows.

    Args:
        size: of a panel, in inches; a single one is a third wider.
        options: of matplotlib's `Figure.subplots`.

    Returns:
        The figure, and its panels in a list.
    """
    from matplotlib.figure import Figure

    columns = min(n, columns)
    rows = -(-n // columns)
    longest = max(len(word) for part in title.split("\n") for word in part.split(" "))
    width = max(size[0] * (columns if n > 1 else 4 / 3), longest / LETTERS)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, round(LETTERS * width), **WHOLE_NAMES)]
    figure = Figure(figsize=(width, size[1] * rows + LINE * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize="medium")
    every = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axes in every[n:]:
        axes.remove()
    for axes in every[:n]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, list(every[:n])


def style(number: int) -> dict:
    """Color, marker and line of the n-th of what is compared: the same in every panel, told apart without colors."""
    return {
        "color": f"C{number % 10}",
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": ("-", "--", ":")[number // 10 % 3],
        "markersize": 5,
    }


def line(axes: "Axes", points: Iterable[tuple[float, float]], number: int, label: str, **options) -> None:
    """Points (x, y) from left to right, in the `style` of a number."""
    points = sorted(points)
    if points:
        axes.plot(*zip(*points, strict=True), **style(number) | options, label=label)


def plain_generate(axes: "Axes", is_upright: bool = False) -> None:
    """The line at which a speed-up is none."""
    draw = axes.axvline if is_upright else axes.axhline
    draw(1, color="gray", linewidth=1, linestyle="-.", label="plain generate")


def whole_numbers(axes: "Axes", values: Iterable[int], is_log: bool = False) -> None:
    """Puts the ticks of a horizontal axis at whole numbers: at those that are shown, as far as there is room.

    Args:
        is_log: for a logarithmic axis, where the values are spread wide enough, and none is 0.
    """
    values = sorted(set(values))
    if is_log := is_log and values[0] > 0 and values[-1] >= LOG_FROM * values[0]:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    elif len(values) > MOST_TICKS:
        axes.xaxis.get_major_locator().set_params(integer=True)
        return
    places = [math.log2(value) if is_log else value for value in values]
    room = 0.02 * (1 + len(str(values[-1]))) * (places[-1] - places[0])
    ticks, last = [], -math.inf
    for value, place in zip(values, places, strict=True):
        if place - last >= room:
            ticks.append(value)
            last = place
    axes.set_xticks(ticks, map(str, ticks))


def legend(figure: "Figure") -> None:
    """Below all panels, in as many columns as have room: each label once."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    letters = LETTERS * figure.get_figwidth()
    columns = max(1, min(len(handles), int(letters / (8 + max(map(len, handles))))))
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(handles) // columns))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")
