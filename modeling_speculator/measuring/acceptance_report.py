"""What `measure_prompts` measured, as a page and plots."""

from typing import TYPE_CHECKING

from . import plots
from .reports import explained_table, head, number


if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLUMNS = {
    "texts": "how they were decoded, and the category of the prompts where there are several",
    "prompts": "how many",
    "tokens per step": "tokens that a verifying forward of the base model emits, the prefill's not counted; 1 without "
    "drafts",
    "95 %": "the interval of that over prompts (bootstrap)",
    "without loops": "tokens per step without the texts that loop (half or more of their 4-grams are repetitions: "
    "easy to guess), and how many do",
    "simulated": "tokens per step that follow from one forward over the finished texts; it has to be the same",
    "accepted per position": "share of steps that emit at least 1, 2, ... drafted tokens",
    "accuracy": "share of positions at which the first choice of head 1, 2, ..., fed the true tokens, is right",
}


def modes_of(report: dict) -> dict[str, dict]:
    return {"greedy": report} | ({"sampled": report["sampled"]} if "sampled" in report else {})


def page(report: dict) -> str:
    """A report in Markdown of what evaluate_acceptance.py writes as JSON."""
    settings = report["settings"]
    modes = [f"{row['new_tokens']} new tokens {_how(mode, row)}" for mode, row in modes_of(report).items()]
    measured = f"{report['prompts']} prompts of {settings['prompts']}, {' and '.join(modes)}"
    models = {"base model": settings["base_model"], "speculator": settings["speculator"]}
    about = {"dtype": settings["dtype"], "machine": report["machine"], "versions": report["versions"]}
    text = head("Acceptance", models, measured=measured, **about)
    text += f"\n{explained_table(COLUMNS, _rows(report))}"
    for mode, figures in modes_of(report).items():
        if figures["partings"]:
            text += f"\n{mode}: simulation and generation part in {len(figures['partings'])} continuations.\n"
    return text


def _how(mode: str, figures: dict) -> str:
    sampling = figures["sampling"] or {}
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items())
    return f"{mode} ({settings})" if settings else mode


def _rows(report: dict) -> list[dict[str, str]]:
    rows = []
    for mode, figures in modes_of(report).items():
        rows.append(_row(mode, figures))
        rows += [_row(f"{mode}, {name}", row) for name, row in figures.get("categories", {}).items()]
    return rows


def _row(name: str, figures: dict) -> dict[str, str]:
    without = number(figures["tokens_per_step_without_loops"], 3)
    return {
        "texts": name,
        "prompts": str(figures["prompts"]),
        "tokens per step": number(figures["tokens_per_step"], 3),
        "95 %": " to ".join(number(end, 3) for end in figures["tokens_per_step_interval"] or []),
        "without loops": f"{without} ({figures['looping']} loop)".strip() if figures["looping"] else without,
        "simulated": number(figures["simulated_tokens_per_step"], 3),
        "accepted per position": ", ".join(number(share, 3) for share in figures["accepted_per_position"]),
        "accuracy": ", ".join(number(share, 3) for share in figures["teacher_forced_accuracy"]),
    }


def figure(report: dict, title: str) -> "Figure | None":
    """What is accepted by position, beside how often each head is right; None for a single head, or no step."""
    sides = {
        "accepted_per_position": ("drafted token", "share of steps that emit it"),
        "teacher_forced_accuracy": ("head, fed the true tokens", "share of positions where it is right"),
    }
    if len(report["accepted_per_position"]) == 1 or not report["steps"]:
        return None
    sides = {key: labels for key, labels in sides.items() if report[key]}  # prompt lookup has no heads
    figure, panels = plots.panels(title, len(sides), sharey=True)
    for axes, (key, (x, y)) in zip(panels, sides.items(), strict=True):
        for at, (mode, row) in enumerate(modes_of(report).items()):
            label = f"{mode}: {number(row['tokens_per_step'])} tokens per step"
            plots.line(axes, enumerate(row[key], start=1), at, label)
        plots.whole_numbers(axes, range(1, len(report[key]) + 1))
        axes.set(xlabel=x, ylabel=y, ylim=(0, 1.03))
        axes.yaxis.set_tick_params(labelleft=True)
    plots.legend(figure)
    return figure


def figure_of_lengths(report: dict, lengths: list[int], title: str) -> "Figure | None":
    """Tokens per step over the length of prompts, with their intervals; None for a single length, or no step."""
    if "categories" not in report or not report["steps"]:
        return None
    figure, (axes,) = plots.panels(title)
    for at, (mode, figures) in enumerate(modes_of(report).items()):
        rows = {length: figures["categories"].get(f"{length} tokens") for length in lengths}
        rows = {length: row for length, row in rows.items() if row and row["steps"]}
        if not rows:  # no step was made in this mode
            continue
        bands = [row["tokens_per_step_interval"] or [row["tokens_per_step"]] * 2 for row in rows.values()]
        axes.fill_between(list(rows), *zip(*bands, strict=True), alpha=0.2, color=f"C{at}")
        plots.line(axes, [(length, row["tokens_per_step"]) for length, row in rows.items()], at, mode)
    plots.whole_numbers(axes, lengths, is_log=True)
    axes.set(xlabel="prompt length (tokens)", ylabel="tokens per step")
    axes.set_title("the bands are 95 % intervals over prompts", fontsize="small")
    plots.legend(figure)
    return figure
