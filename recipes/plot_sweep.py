"""A table and plots of what recipes/sweep.py has measured.

python recipes/plot_sweep.py outputs/sweeps/heads/results.json
"""

import json
import re
import statistics
from functools import partial
from pathlib import Path

from modeling_speculator.command_line import parser_of, run
from modeling_speculator.measuring import plots


MODES = ("greedy", "sampled")
TOKENS_PER_STEP = "tokens per step on held-out prompts"
DEFAULT_LOSS = "cross_entropy"  # sweeps/stage1.yaml and stage2.yaml name none
# What a loss depends on beside its name: values are compared only where all of these are the same.
LOSS_KEYS = ("loss_weights", "head_weights", "target_temperature", "target_top_k")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("results", type=Path, metavar="FILE", help="results.json of sweep.py")
    path = parser.parse_args().results
    try:
        results = json.loads(path.read_text())
        rows, variants, machine = results["rows"], results["sweep"]["variants"], results["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results.json of sweep.py.") from error
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    show(by_variant)
    models = {"base model": results["base_model"]} if "base_model" in results else {}
    title = partial(plots.title, models=models, machine=machine)
    by_heads = {rows[0]["n_predict"]: rows for name, rows in by_variant.items() if re.fullmatch(r"\d+ heads?", name)}
    drawings = {
        "tokens_per_step": partial(tokens_per_step, by_variant, title("Tokens per step of ways to train")),
        "losses": partial(losses, by_variant, variants, title("Losses in training, of the first seed")),
    }
    if by_heads:
        drawings["by_heads"] = partial(over_heads, by_heads, title("Tokens per step, by the number of heads"))
    drawn = plots.write(path.parent, {f"{path.stem}_{name}.png": drawing for name, drawing in drawings.items()})
    if drawn:
        print(f"Written to {path.parent}: {', '.join(drawn)}")


def show(by_variant: dict[str, list[dict]]) -> None:
    """Means over the seeds and their range; a difference from the first row within the spread of the seeds is none."""
    first = next(iter(by_variant.values()))
    print("| | tokens per step, greedy | | | sampled | | | parameters, M |\n|---|---|---|---|---|---|---|---|")
    for variant, rows in by_variant.items():
        cells = [variant]
        for name in MODES:
            values, others = [row[name] for row in rows], [row[name] for row in first]
            cells += [
                f"{statistics.mean(values):.3f}",
                f"{min(values):.3f} to {max(values):.3f}",
                verdict(values, others),
            ]
        print("| " + " | ".join([*cells, f"{rows[0]['parameters'] / 1e6:.2f}"]) + " |")


def verdict(values: list[float], others: list[float]) -> str:
    """The difference of the means in percent, or "none" where the seeds' ranges overlap."""
    if max(values) >= min(others) and max(others) >= min(values):
        return "none"
    return f"{100 * (statistics.mean(values) / statistics.mean(others) - 1):+.1f} %"


def tokens_per_step(by_variant: dict[str, list[dict]], title: str):
    """A row a variant: a dot for each seed, and a line at their mean; None of a single variant."""
    if len(by_variant) < 2:
        return None
    figure, (axes,) = plots.panels(title, size=(6, 1 + 0.3 * len(by_variant)))
    for at, (offset, mode) in enumerate(zip((-0.15, 0.15), MODES, strict=True)):
        for place, rows in enumerate(by_variant.values()):
            values, color = [row[mode] for row in rows], plots.style(at)["color"]
            axes.plot(values, [place + offset] * len(values), ".", color=color, alpha=0.5, label=f"{mode}, a seed")
            axes.plot(statistics.mean(values), place + offset, "|", color=color, markersize=10, label=f"{mode}, mean")
    axes.set_yticks(range(len(by_variant)), by_variant)
    axes.set(xlabel=TOKENS_PER_STEP, ylabel="variant", ylim=(len(by_variant) - 0.5, -0.5))
    plots.legend(figure)
    return figure


def over_heads(by_heads: dict[int, list[dict]], title: str):
    """Means over the seeds; None of a single number of heads."""
    if len(by_heads) < 2:
        return None
    figure, (axes,) = plots.panels(title)
    for at, mode in enumerate(MODES):
        points = [(heads, statistics.mean(row[mode] for row in rows)) for heads, rows in by_heads.items()]
        plots.line(axes, points, at, f"{mode}, mean of the seeds")
    plots.whole_numbers(axes, by_heads)
    axes.set(xlabel="heads", ylabel=TOKENS_PER_STEP)
    plots.legend(figure)
    return figure


def losses(by_variant: dict[str, list[dict]], variants: dict[str, dict], title: str):
    """A panel for each kind of loss in each stage; None where none was logged twice."""
    curves = {}
    for variant, rows in by_variant.items():
        for stage, curve in rows[0]["losses"].items():
            per_head = [(step, loss / rows[0]["n_predict"]) for step, loss in curve]
            if len(per_head) > 1:
                curves.setdefault(kind_of_loss(variants[variant], stage), {})[variant] = per_head
    if not curves:
        return None
    numbers = {variant: number for number, variant in enumerate(by_variant)}
    by_stage = sorted(curves.items(), key=lambda item: item[0].partition(":")[0])
    figure, panels = plots.panels(title, len(curves))
    for axes, (kind, by_name) in zip(panels, by_stage, strict=True):
        for variant, curve in by_name.items():
            plots.line(axes, curve, numbers[variant], variant, marker="")
        plots.whole_numbers(axes, [step for curve in by_name.values() for step, _ in curve])
        axes.set(xlabel="training step", ylabel="loss, mean over the heads")
        axes.set_title(kind, fontsize="small")
    plots.legend(figure)
    return figure


def kind_of_loss(variant: dict, stage: str) -> str:
    """The stage, and the loss of a variant there with all that its value depends on."""
    options = variant | variant.get(stage, {})
    loss = options.get("loss", DEFAULT_LOSS)
    names = [loss] if isinstance(loss, str) else loss
    more = [f"{key} {options[key]}" for key in LOSS_KEYS if key in options]
    return "\n".join([f"{stage.replace('stage', 'stage ')}: {' + '.join(names)}", *more])


if __name__ == "__main__":
    run(main)
