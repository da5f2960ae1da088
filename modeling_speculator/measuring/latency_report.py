"""What `measure_latency` measured, as a page and a plot."""

from typing import TYPE_CHECKING

from . import plots
from .reports import explained_table, head, number, table


if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLUMNS = {
    "method": "way to decode; after `static:` with a static cache, after `compiled:` compiled, too",
    "candidates": "`n_candidates`, sequences that are drafted a step; 0: the loop itself, which drafts nothing",
    "top-k per head": "`top_k_tokens_per_head`, tokens that each head drafts after each token before it",
    "batch size": "rows that are generated together",
    "prompt length": "in tokens",
    "speed-up": "times plain `generate`, or why there is none. It is the median, over rounds, of each run against the "
    "runs of `generate` right before and after it, not the ratio of two speeds of this table",
    "tokens/s": "new tokens a second of all rows together, the first ones included; median over rounds",
    "slowest to fastest": "the same of single rounds, in tokens/s",
    "tokens per step": "tokens that a forward of the base model yields, the prefill's not counted; 1 without drafts",
    "first token, ms": "time to the first token of a batch, in milliseconds; median over rounds",
    "time per token, ms": "time for a token of every row, after the first, in milliseconds; median over rounds",
    "same output": "texts that are, token for token, those of plain `generate`",
    "texts that loop": "half or more of their 4-grams are repetitions: easy to guess, which flatters every drafter",
    "GiB beside weights": "the most GPU memory that it took beside the weights of all models",
}
AXES = {
    "n_candidates": "candidates per step",
    "batch_size": "batch size (rows)",
    "prompt_length": "prompt length (tokens)",
}
SPEEDUP = "speed-up over generate"


def page(rows: list[dict], rounds: int, **about) -> str:
    """A report in Markdown.

    Args:
        rows: of `measure_latency`, with the batch size, length of prompts and machine of each.
        about: of `reports.head`.
    """
    measured = [row for row in rows if "outputs" in row]
    dates, prompts = ({row["machine"]["date"] for row in measured}, {row["outputs"] for row in measured})
    if dates:
        about["machine"] = about["machine"] | {"date": _range(dates)}
    new_tokens = _range({row["new_tokens"] for row in rows})
    how_much = f"{_range(prompts) or 'no'} prompts at each load, {new_tokens} new tokens each"
    text = head("Speed-up over plain generate", measured=f"{how_much}; rounds in turn: {rounds}", **about)
    return f"{text}\n{explained_table(COLUMNS, _cells(rows))}"


def short_table(rows: list[dict]) -> str:
    return table(COLUMNS, _cells(rows))


def _range(values: set) -> str:
    return " to ".join(map(str, sorted({min(values), max(values)}))) if values else ""


def _cells(rows: list[dict]) -> list[dict[str, str]]:
    return [{column: "" if cell is None else str(cell) for column, cell in _row(row).items()} for row in rows]


def _row(row: dict) -> dict:
    problem = row.get("skipped") or row.get("error", "").partition("\n")[0][:100]
    cells = {
        "method": row["method"],
        "candidates": row.get("n_candidates"),
        "top-k per head": row.get("top_k_tokens_per_head"),
        "batch size": row["batch_size"],
        "prompt length": row["prompt_length"],
        "speed-up": problem or number(row.get("speedup")),
    }
    if problem:
        return cells
    return cells | {
        "tokens/s": number(row["tokens_per_second"], 1),
        "slowest to fastest": " to ".join(number(rate, 1) for rate in row["tokens_per_second_range"]),
        "tokens per step": number(row["tokens_per_step"]),
        "first token, ms": number(row["first_token_ms"]),
        "time per token, ms": number(row["ms_per_token"]),
        "same output": _share(row, "identical_outputs"),
        "texts that loop": _share(row, "looping"),
        "GiB beside weights": number(row.get("gib_beside_weights")),
    }


def _share(row: dict, name: str) -> str:
    return f"{row[name]} of {row['outputs']}" if "outputs" in row else ""


def figure(rows: list[dict], title: str) -> "Figure | None":
    """Speed-up over candidates, batch size and length of prompts, as far as they vary; bars of methods if none does.

    Returns:
        None where a single method was timed, at one load.
    """
    done = [row for row in rows if "speedup" in row and row["method"] != "generate"]
    methods = list(dict.fromkeys(row["method"] for row in done))
    curves = {axis: {method: _curve(done, axis, method) for method in methods} for axis in AXES}
    varied = [axis for axis, by_method in curves.items() if any(len(curve) > 1 for curve in by_method.values())]
    if not varied:
        return _bars(done, methods, title) if len(methods) > 1 else None
    figure, panels = plots.panels(title, len(varied), sharey=True)
    for axes, axis in zip(panels, varied, strict=True):
        values = {value for curve in curves[axis].values() for value in curve}
        for number_, method in enumerate(methods):
            curve, options = curves[axis][method], {}
            if axis == "n_candidates" and not curve:  # it has none: the same for all
                level, options = _fastest(done, method), {"marker": "", "linestyle": ":"}
                curve = {} if level is None else dict.fromkeys((min(values), max(values)), level["speedup"])
            plots.line(axes, curve.items(), number_, method, **options)
        plots.plain_generate(axes)
        plots.whole_numbers(axes, values, is_log=True)
        axes.set_title(_held(done, axis), fontsize="small")
        axes.set(xlabel=AXES[axis], ylabel=SPEEDUP)
        axes.yaxis.set_tick_params(labelleft=True)
    plots.legend(figure)
    return figure


def _curve(rows: list[dict], axis: str, method: str) -> dict[int, float]:
    """Speed-up of a method along an axis; along any but candidates, with the fastest number of them above 0."""
    here = [row for row in _at_first(rows, axis) if row["method"] == method and axis in row]
    if axis != "n_candidates":
        here = _drafting(here)
    return {value: max(row["speedup"] for row in here if row[axis] == value) for value in {row[axis] for row in here}}


def _at_first(rows: list[dict], axis: str | None = None) -> list[dict]:
    """Those at the load of the first, but for the axis that they are looked at along."""
    fixed = [other for other in ("batch_size", "prompt_length") if other != axis]
    return [row for row in rows if all(row[other] == rows[0][other] for other in fixed)]


def _drafting(rows: list[dict]) -> list[dict]:
    """Without those of 0 candidates, where there are others."""
    return [row for row in rows if row.get("n_candidates") != 0] or rows


def _fastest(rows: list[dict], method: str) -> dict | None:
    """The row of a method at the first load, of its fastest number of candidates above 0; None where it has none."""
    here = _drafting([row for row in _at_first(rows) if row["method"] == method])
    return max(here, key=lambda row: row["speedup"], default=None)


def _held(rows: list[dict], axis: str | None = None) -> str:
    """What a panel holds fixed, in words."""
    first, held = rows[0], []
    if axis != "batch_size":
        held.append(f"batch size {first['batch_size']}")
    if axis != "prompt_length":
        held.append(f"prompts of {first['prompt_length']} tokens")
    dials = {(row["method"], row["n_candidates"]) for row in rows if row.get("n_candidates")}
    some_method_has_several = len(dials) > len({method for method, _ in dials})
    if axis != "n_candidates" and some_method_has_several:
        held.append("the fastest candidates")
    return ", ".join(held)


def _bars(rows: list[dict], methods: list[str], title: str) -> "Figure | None":
    found = {method: row for method in methods if (row := _fastest(rows, method))}
    if len(found) < 2:
        return None
    figure, (axes,) = plots.panels(title, size=(4.5, 1.3 + 0.3 * len(found)))
    bars = axes.barh(list(found), [row["speedup"] for row in found.values()], color="C0")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    plots.plain_generate(axes, is_upright=True)
    axes.set(xlabel=SPEEDUP, ylabel="method")
    axes.set_title(_held(rows), fontsize="small")
    plots.legend(figure)
    return figure
