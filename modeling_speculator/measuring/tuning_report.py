"""What `tune` predicted and measured, as lines, a page and a plot."""

from typing import TYPE_CHECKING

from . import plots
from .reports import explained_table, head, number


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLUMNS = {
    "batch size": "rows that are generated together",
    "prompt length": "in tokens",
    "dials": "of the speculator: the fastest by the prediction, its own, and none",
    "predicted": "speed-up, times plain `generate`",
    "measured": "the same: the median over rounds of each run against that of `generate` in its round, which is not "
    "the ratio of two speeds of this table",
    "off by": "the predicted speed-up over the measured one, less 1",
    "tokens/s": "new tokens a second of all rows together, without the first ones; median over rounds",
    "recommended": "the fastest of what was measured",
}
COSTS = {
    "batch size": "rows that are generated together",
    "prompt length": "in tokens",
    "step, ms": "what a step takes in milliseconds, whatever it drafts, as fitted to steps with several dials",
    "node, ms": "and for each node of the tree that is verified",
    "head, ms": "and for each head that drafts",
    "state, ms": "and for each state that a head scores",
}
SPEEDUP = "speed-up over generate"


def load_of(record: dict) -> tuple[int, int]:
    return record["batch_size"], record["context"]


def dials(row: dict) -> str:
    if row["n_candidates"] == 0:
        return "no speculation"
    tree = f"n_tree_nodes={row['n_tree_nodes']}" if row["n_tree_nodes"] else f"n_candidates={row['n_candidates']}"
    lookup = f", lookup of {row['n_lookup_tokens']}" if row.get("n_lookup_tokens") else ""
    return f"{tree} of {row['top_k_tokens_per_head'][: row['n_heads']]}{lookup}"


def lines(record: dict) -> str:
    """What one load came to, for a terminal."""
    costs = ", ".join(f"{value:.3g} ms {name.replace('_', ' ')}" for name, value in record["cost_ms"].items())
    text = [
        f"\nBatch {record['batch_size']}, context {record['context']}: a step costs {costs}.",
        f"Plain decoding: {record['plain_tokens_per_second']:.0f} tokens/s. Predicted, the fastest first:",
    ]
    for row in record["predictions"][:5]:
        text.append(
            f"  {dials(row):44}{row['tokens_per_second']:8.0f} tokens/s, {row['speedup']:.2f} x, "
            f"{row['tokens_per_step']:.2f} tokens per step ({row['break_even_tokens_per_step']:.2f} to break even)"
        )
    for row, name in zip(record["verified"], ("the first of these", "its own dials"), strict=False):
        text.append(
            f"Measured, {name}, {dials(row)}: {row['measured_tokens_per_second']:.0f} tokens/s, "
            f"{row['measured_speedup']:.2f} x; the prediction was off by {row['prediction_error']:+.1%}, of the "
            f"speed-up by {row['speedup_error']:+.1%}."
        )
    return "\n".join([*text, f"Recommended: {dials(record['recommended'])}."])


def page(report: dict) -> str:
    """A report in Markdown of what tune.py writes as JSON."""
    settings, records = report["settings"], report["loads"]
    measured = f"{settings['n_prompts']} prompts at each load, in full batches"
    measured += f", {settings['max_new_tokens']} new tokens each; rounds in turn: {settings['rounds']}"
    models = {"base model": settings["base_model"], "speculator": settings["speculator"]}
    about = {name: report[name] for name in ("dtype", "machine", "versions")}
    text = head("Will it help, and with which dials?", models, measured=measured, **about)
    text += f"\n{explained_table(COLUMNS, [row for record in records for row in _rows(record)])}"
    return f"{text}\n{explained_table(COSTS, [_costs(record) for record in records])}"


def _load(record: dict) -> dict[str, str]:
    return {"batch size": str(record["batch_size"]), "prompt length": str(record["context"])}


def _rows(record: dict) -> list[dict[str, str]]:
    recommended = dials(record["recommended"])
    rows = [
        {
            "dials": dials(row),
            "predicted": number(predicted_speedup(row)),
            "measured": number(row["measured_speedup"]),
            "off by": f"{row['speedup_error']:+.1%}",
            "tokens/s": number(row["measured_tokens_per_second"], 1),
            "recommended": "yes" if dials(row) == recommended else "",
        }
        for row in record["verified"]
    ]
    plain = {"dials": "none: plain `generate`", "measured": number(1.0)}
    plain |= {"tokens/s": number(record["plain_tokens_per_second"], 1)}
    plain |= {"recommended": "" if any(row["recommended"] for row in rows) else "yes"}
    return [_load(record) | row for row in [*rows, plain]]


def _costs(record: dict) -> dict[str, str]:
    costs = {f"{name.removeprefix('per_')}, ms": number(value, 3) for name, value in record["cost_ms"].items()}
    return _load(record) | costs


def predicted_speedup(row: dict) -> float:
    """Of the dials that a row of `verified` has measured."""
    return row["measured_speedup"] * (1 + row["speedup_error"])


def figure(records: list[dict], title: str) -> "Figure":
    """What is predicted over the size of the tree, and beside it what was predicted and measured of the same dials."""
    curves = [_over_nodes(record) for record in records]
    has_curves = any(len(curve) > 1 for curve in curves)
    n_pairs = sum(len(record["verified"]) for record in records)
    figure, panels = plots.panels(title, 1 + has_curves, size=(5.5, max(3.5, 1 + 0.4 * n_pairs)))
    if has_curves:
        _draw_curves(panels[0], records, curves)
    _draw_pairs(panels[-1], records)
    plots.legend(figure)
    return figure


def _over_nodes(record: dict) -> dict[int, float]:
    all_heads = [row for row in record["predictions"] if row["n_tree_nodes"] and row["n_heads"] is None]
    rows = [row for row in all_heads if not row.get("n_lookup_tokens")]
    return {row["n_tree_nodes"]: row["speedup"] for row in rows}


def _draw_curves(axes: "Axes", records: list[dict], curves: list[dict[int, float]]) -> None:
    for number_, (record, curve) in enumerate(zip(records, curves, strict=True)):
        plots.line(axes, curve.items(), number_, _load_in_words(record))
    plots.plain_generate(axes)
    plots.whole_numbers(axes, {n_nodes for curve in curves for n_nodes in curve}, is_log=True)
    axes.set(xlabel="n_tree_nodes, drafted by all heads", ylabel=f"predicted {SPEEDUP}")


def _draw_pairs(axes: "Axes", records: list[dict]) -> None:
    """A line for each measured setting of the dials, from what was predicted of it to what was measured."""
    names = []
    for number_, record in enumerate(records):
        color = plots.style(number_)["color"]
        for row in record["verified"]:
            pair, height = (predicted_speedup(row), row["measured_speedup"]), [len(names)] * 2
            axes.plot(pair, height, "-", color=color)
            axes.plot(pair[:1], height[:1], "o", color=color, markerfacecolor="white")
            axes.plot(pair[1:], height[1:], "o", color=color)
            names.append(f"{_load_in_words(record)}\n{dials(row)}")
    for label, face in (("predicted", "white"), ("measured", "gray")):  # of any color
        axes.plot([], [], "o", color="gray", markerfacecolor=face, label=label)
    plots.plain_generate(axes, is_upright=True)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel=SPEEDUP, ylabel="load and dials", ylim=(len(names) - 0.5, -0.5))


def _load_in_words(record: dict) -> str:
    return f"batch size {record['batch_size']}, prompts of {record['context']} tokens"
