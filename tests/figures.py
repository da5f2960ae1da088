"""What every plot keeps to, checked on the figure: words on axes, whole numbers, and nothing that lies over data."""

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg


def check_figure(figure, *named: str):
    """Its panels, after a check of it.

    Args:
        named: what the title has to name.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    title = " ".join(figure.get_suptitle().split())
    assert all(name in title for name in named), title
    inside = figure.get_tightbbox(canvas.get_renderer())
    assert inside.x0 >= -0.01 and inside.x1 <= figure.get_figwidth() + 0.01, "wider than the figure"
    assert inside.y0 >= -0.01 and inside.y1 <= figure.get_figheight() + 0.01, "higher than the figure"
    (legend,) = figure.legends
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel()
        assert axes.get_legend() is None
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        for one, other in combinations(labels, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), "labels of ticks overlap"
    for one, other in combinations(figure.axes, 2):
        assert not one.get_tightbbox().overlaps(other.get_tightbbox())
    return figure.axes


def ticks(axes) -> list[int]:
    """Of the horizontal axis, which has to be one of whole numbers."""
    low, high = axes.get_xlim()
    places = [place for place in axes.get_xticks() if low <= place <= high]
    assert all(place == int(place) for place in places)
    return [int(place) for place in places]


def names(figure) -> list[str]:
    """In the legend."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]
