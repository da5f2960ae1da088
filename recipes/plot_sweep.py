"""A table and plots of what recipes/sweep.py has measured.

python recipes/plot_sweep.py outputs/sweeps/heads/results.json
"""

import json
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from modeling_speculator.command_line import parser_of, run


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("results", type=Path, metavar="FILE", help="results.json of sweep.py")
    path = parser.parse_args().results
    try:
        rows = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results.json of sweep.py.") from error
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    show(by_variant)
    plot_tokens_per_step(by_variant, path.with_name(f"{path.stem}_tokens_per_step.png"))
    plot_losses(by_variant, path.with_name(f"{path.stem}_losses.png"))
    by_heads = {rows[0]["n_predict"]: rows for name, rows in by_variant.items() if re.fullmatch(r"\d+ heads?", name)}
    if len(by_heads) > 1:
        plot_heads(by_heads, path.with_name(f"{path.stem}_by_heads.png"))


def show(by_variant: dict[str, list[dict]]) -> None:
    """Means over the seeds and their range; a difference from the first row within the spread of the seeds is none."""
    first = next(iter(by_variant.values()))
    print("| | tokens per step, greedy | | | sampled | | | parameters, M |\n|---|---|---|---|---|---|---|---|")
    for variant, rows in by_variant.items():
        cells = [variant]
        for name in ("greedy", "sampled"):
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


def plot_tokens_per_step(by_variant: dict[str, list[dict]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.3 * len(by_variant)), layout="constrained")
    for offset, name in ((0.15, "greedy"), (-0.15, "sampled")):
        for at, rows in enumerate(by_variant.values()):
            values = [row[name] for row in rows]
            color = {"greedy": "C0", "sampled": "C1"}[name]
            axes.plot(values, [-at + offset] * len(values), ".", color=color, alpha=0.5)
            axes.plot(
                [statistics.mean(values)],
                [-at + offset],
                "|",
                color=color,
                markersize=10,
                label=name if not at else "",
            )
    axes.set_yticks([-at for at in range(len(by_variant))], by_variant)
    axes.set_xlabel("tokens per step on held-out prompts")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")


def plot_heads(by_heads: dict[int, list[dict]], path: Path) -> None:
    """Tokens per step over the number of heads."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name in ("greedy", "sampled"):
        points = sorted((heads, statistics.mean(row[name] for row in rows)) for heads, rows in by_heads.items())
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="heads", ylabel="tokens per step on held-out prompts", ylim=(1, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")


def plot_losses(by_variant: dict[str, list[dict]], path: Path) -> None:
    """Of the first seed, a panel a stage. Losses of different kinds or numbers of heads are not comparable."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, stage in zip(panels, ("stage1", "stage2"), strict=True):
        for number, (variant, rows) in enumerate(by_variant.items()):
            curve = rows[0]["losses"].get(stage)
            if curve:
                heads = rows[0]["n_predict"]
                style = ("-", "--", ":")[number // 10 % 3]
                axes.plot(*zip(*[(step, loss / heads) for step, loss in curve], strict=True), style, label=variant)
        axes.set(xlabel="step", ylabel="loss per head", title=stage.replace("stage", "stage "))
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")


if __name__ == "__main__":
    run(main)
