"""Drafters side by side: what their training took, what they draft, and what that costs; from files that are there.

python recipes/sweep.py --variants recipes/sweeps/field.yaml --base_model X --corpus Y --output_dir outputs/field
python recipes/benchmark_latency.py --base_model X --prompts Y/held_out.jsonl --n_candidates 0 1 5 \\
    --drafters eagle=outputs/field/EAGLE-0/stage2 ... --methods eagle eagle+lookup ... --output outputs/field/latency
python recipes/field_table.py --sweep outputs/field/results.json --latency outputs/field/latency/latency.json \\
    --output outputs/field/table

A drafter has the same name in both files, but for case, spaces and signs. A step's cost is what it takes beyond one of
the same loop without drafts, the verification of its nodes included.
"""

import json
import re
import statistics
from functools import partial
from pathlib import Path

from modeling_speculator.command_line import output_folder, parser_of, run, say_end
from modeling_speculator.measuring import plots


SHAPES = {1: "chain", 5: "tree"}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sweep", type=Path, nargs="+", required=True, metavar="FILE", help="results of sweep.py")
    parser.add_argument(
        "--latency", type=Path, required=True, metavar="FILE", help="latency.json of the same drafters"
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="FOLDER", help="for field.json, field.md and field.png"
    )
    args = parser.parse_args()
    sweeps, timed = [json.loads(path.read_text()) for path in args.sweep], json.loads(args.latency.read_text())
    rows = table(sweeps, timed)
    about = {"commands": [sweep["command"] for sweep in sweeps], "machine": timed[0]["machine"]}
    about |= {"versions": timed[0]["versions"], "base_model": timed[0]["base_model"]}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "field.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    (args.output / "field.md").write_text(as_markdown(rows) + "\n")
    title = plots.title(
        "Tokens per step, and what a step costs", {"base model": about["base_model"]}, about["machine"]
    )
    plots.write(args.output, {"field.png": partial(figure, rows, title)})
    print(as_markdown(rows))
    say_end(*sorted(args.output.iterdir()))


def table(sweeps: list[dict], timed: list[dict]) -> list[dict]:
    """A row for each drafter of the sweeps, and for those that need no training.

    Raises:
        ValueError: where the timings lack a step without drafts.
    """
    trained: dict[str, list[dict]] = {}
    for row in (row for sweep in sweeps for row in sweep["rows"]):
        trained.setdefault(row["variant"], []).append(row)
    measured = [row for row in timed if row.get("tokens_per_step")]
    plain = [milliseconds(row) for row in measured if row.get("n_candidates") == 0]
    if not plain:
        raise ValueError("The timings have no step without drafts: measure with `--n_candidates 0` among others.")
    rows = []
    for name in [*trained, *("lookup", "generate")]:
        row = {"drafter": name}
        if seeds := trained.get(name):
            row |= {"parameters": seeds[0]["parameters"], "seeds": len(seeds)}
            row |= {"training_seconds": statistics.mean(each["training_seconds"] for each in seeds)}
            row |= {f"simulated_{mode}": [each[mode] for each in seeds] for mode in ("greedy", "sampled")}
        for each in timed:
            what, branch = each["method"].removesuffix("+lookup"), each["method"].endswith("+lookup")
            if _plain(what) != _plain(name):
                continue
            shape = SHAPES.get(each.get("n_candidates"), "") if name in trained else name
            if shape and each.get("tokens_per_second"):
                of = {name: each.get(name) for name in ("tokens_per_step", "tokens_per_second", "speedup")}
                if of["tokens_per_step"]:
                    of["milliseconds_beyond_plain"] = milliseconds(each) - statistics.median(plain)
                row[f"{shape}+lookup" if branch else shape] = of
        rows.append(row)
    return rows


def milliseconds(row: dict) -> float:
    """Of a step after the prompt."""
    return row["ms_per_token"] * row["tokens_per_step"]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower().replace("++", "plus"))


def as_markdown(rows: list[dict]) -> str:
    shapes = ["chain", "chain+lookup", "tree", "tree+lookup"]
    heads = [f"{shape}: tokens per step, per second, ms" for shape in shapes]
    lines = ["| " + " | ".join(["drafter", "parameters, M", "training, s", "simulated, sampled", *heads]) + " |"]
    lines.append("|---" * (4 + len(shapes)) + "|")
    for row in rows:
        cells = [row["drafter"], _number(row.get("parameters", 0) / 1e6, 2), _number(row.get("training_seconds"), 0)]
        means = [statistics.mean(row.get(f"simulated_{mode}", [0])) for mode in ("greedy", "sampled")]
        cells.append(f"{means[0]:.2f}, {means[1]:.2f}" if any(means) else "")
        for shape in shapes:
            of = row.get(shape) or (row.get(row["drafter"]) if shape == "chain" else None)
            said = [_number(of.get("tokens_per_step"), 2), _number(of.get("tokens_per_second"), 0)] if of else []
            said += [_number(of.get("milliseconds_beyond_plain"), 2)] if of else []
            cells.append(", ".join(filter(None, said)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return f"{value:,.{digits}f}" if value else ""


def figure(rows: list[dict], title: str):
    """A point for each drafter and shape of its tree."""
    drawing, (axes,) = plots.panels(title, size=(7, 5))
    for at, shape in enumerate(("chain", "chain+lookup", "tree", "tree+lookup")):
        points = [(row["drafter"], row[shape]) for row in rows if (row.get(shape) or {}).get("tokens_per_step")]
        if not points:
            continue
        places = [(of["milliseconds_beyond_plain"], of["tokens_per_step"]) for _, of in points]
        axes.plot(*zip(*places, strict=True), "o", color=plots.style(at)["color"], label=shape)
        for (name, _), place in zip(points, places, strict=True):
            axes.annotate(name, place, fontsize="xx-small", xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="milliseconds of a step beyond one without drafts", ylabel="tokens per step")
    plots.legend(drawing)
    return drawing


if __name__ == "__main__":
    run(main)
