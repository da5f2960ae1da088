"""The card of a speculator: every number comes from a file that a measurement or a training wrote."""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..measuring.benchmarking import machine_name


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["speculative-decoding", "speculator", "mlp_speculator"]
CURVE_POINTS = 8
_NEUTRAL = {"top_p": 1.0, "top_k": 0}
_STAGES = {1: "on text", 2: "on what the base model writes itself"}
_NAMES = {  # of a form, and the paper that it is of; others are MLP speculators
    "medusa": ("Medusa heads", "2401.10774"),
    "eagle": ("An EAGLE layer", "2401.15077"),
    "eagle 3": ("An EAGLE-3 layer", "2503.01840"),
    "hydra": ("Hydra heads", "2402.05109"),
    "hydra++": ("Hydra++ heads", "2402.05109"),
    "redrafter": ("A recurrent drafter", "2403.09919"),
    "streaming": ("Speculative Streaming", "2402.11131"),
}
_NO_VOCABULARY = ("residual", "context", "eagle", "streaming")
_TOLD_OF_A_PART = ("processes", "git_revision")  # of what is not an argument or a version
_PROMPT = {True: "def quicksort(numbers):", False: "The capital of France is"}


def render_card(
    repo_id: str,
    config,
    parameters: int,
    provenance: dict | None = None,
    acceptance: dict | None = None,
    latency: list[dict] | None = None,
    license: str | None = None,
) -> str:
    """The README.md of a speculator's repository.

    Args:
        config: of the speculator, with `base_model_name_or_path`, a Hub id.
        parameters: how many it has.
        provenance: what the training wrote beside it.
        acceptance: of evaluate_acceptance.py.
        latency: rows of benchmark_latency.py.
        license: as the Hub writes it ("apache-2.0"), where it is known.
    """
    base_model, stages = config.base_model_name_or_path, training_stages(provenance)
    results = eval_results(acceptance) if acceptance else []
    card_data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter",  # of the four that the Hub knows, the one that is used beside its base model
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=TAGS,
        datasets=sorted({stage["dataset"] for stage in stages if "/" in (stage["dataset"] or "")}) or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    about_code = acceptance is not None and "humaneval" in acceptance["settings"]["prompts"].lower()
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        base_model=base_model,
        at_revision=f', revision="{config.base_model_revision}"' if config.base_model_revision else "",
        config=config,
        form=form_of(config),
        parameters=f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M",
        prompt=_PROMPT[about_code],
        acceptance=acceptance_section(acceptance) if acceptance else None,
        latency=latency_section(latency) if latency else None,
        stages=stages,
        provenance=provenance_lines(config, provenance),
    )
    return str(card)


def form_of(config) -> dict:
    """What a drafter is called, the paper that it is of, and whether it has no embeddings nor LM heads."""
    kind = config.method
    if kind == "eagle" and config.feature_layers:
        kind = "eagle 3"
    if kind == "hydra" and config.prefix_layer:
        kind = "hydra++"
    name, paper = _NAMES.get(kind, ("An MLP speculator", "2404.19124"))
    has_own = getattr(config, "own_embeddings", False) or getattr(config, "own_lm_head", False)
    return {"name": name, "paper": paper, "has_no_vocabulary": config.method in _NO_VOCABULARY and not has_own}


def eval_results(acceptance: dict) -> list[EvalResult]:
    """Tokens per step, of all prompts and by category, greedy and sampled, as the Hub's `model-index` lists it.

    Texts that loop are left out, since they are easy to guess; where all do, there is no figure.
    """
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=category or Path(acceptance["settings"]["prompts"]).name,
            dataset_name=category or Path(acceptance["settings"]["prompts"]).name,
            metric_type="tokens_per_step",
            metric_name=f"tokens per step, {mode}"
            + (f", {_looping(row)} texts left out, which loop" if row["looping"] else ""),
            metric_value=round(row["tokens_per_step_without_loops"], 3),
        )
        for mode, category, row in rows_of(acceptance)
        if row["tokens_per_step_without_loops"] is not None
    ]


def rows_of(acceptance: dict) -> list[tuple[str, str | None, dict]]:
    """(mode, category or None for all, figures)."""
    modes = {"greedy": acceptance} | ({"sampled": acceptance["sampled"]} if "sampled" in acceptance else {})
    return [
        (mode, category, row)
        for mode, figures in modes.items()
        for category, row in {None: figures, **figures.get("categories", {})}.items()
    ]


def acceptance_section(acceptance: dict) -> dict:
    settings = acceptance["settings"]
    lines = ["| | prompts | tokens per step | texts that loop | with these | 95 % | accepted, by position |"]
    lines.append("|---" * 7 + "|")
    for mode, category, row in rows_of(acceptance):
        cells = [f"{category}, {mode}" if category else mode, str(row["prompts"])]
        cells.append("all loop" if _all_loop(row) else _number(row["tokens_per_step_without_loops"]))
        cells += [_looping(row), _number(row["tokens_per_step"])]
        cells.append(" to ".join(map(_number, row["tokens_per_step_interval"] or [])))
        cells.append(", ".join(map(_number, row["accepted_per_position"] or [])))
        lines.append("| " + " | ".join(cells) + " |")
    dial = "n_tree_nodes" if settings["n_tree_nodes"] else "n_candidates"
    dials = f"`{dial}={settings[dial]}` of `top_k_tokens_per_head={settings['top_k_tokens_per_head']}`"
    if n_lookup_tokens := settings.get("n_lookup_tokens"):
        dials += f" and a lookup branch, `n_lookup_tokens={n_lookup_tokens}`"
    sampling = acceptance.get("sampled", {}).get("sampling") or {}
    return {
        "table": "\n".join(lines),
        "all_loop": [mode for mode, category, row in rows_of(acceptance) if category is None and _all_loop(row)],
        "prompts": Path(settings["prompts"]).name,
        "max_new_tokens": settings["max_new_tokens"],
        "dials": dials,
        "is_chat": settings["chat"],
        "sampling": {name: value for name, value in sampling.items() if value != _NEUTRAL.get(name)},
        "base_model": settings["base_model"],
        "machine": _machine(acceptance["machine"], acceptance["versions"]),
    }


def _all_loop(row: dict) -> bool:
    return row["looping"] > 0 and row["tokens_per_step_without_loops"] is None


def _looping(row: dict) -> str:
    """How many texts do, of how many, which files of earlier versions do not say."""
    return " of ".join(str(row[name]) for name in ("looping", "texts") if name in row)


def latency_section(latency: list[dict]) -> dict:
    """What ran, at the first length of prompts; the numbers of candidates and batch sizes are those of the rows."""
    rows = [row for row in latency if "speedup" in row]
    first = rows[0]
    rows = [row for row in rows if row["prompt_length"] == first["prompt_length"]]
    lines = ["| | candidates | batch | x generate | tokens/s | tokens per step | texts that loop | same output |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        cells = [row["method"], row.get("n_candidates"), row["batch_size"], f"{row['speedup']:.2f}"]
        cells += [f"{row['tokens_per_second']:.0f}", _number(row["tokens_per_step"])]
        cells += [f"{row[name]} of {row['outputs']}" for name in ("looping", "identical_outputs")]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return {
        "table": "\n".join(lines),
        "machine": _machine(first["machine"], first["versions"]),
        "dtype": first["dtype"].removeprefix("torch."),
    } | {name: first[name] for name in ("prompt_length", "new_tokens", "base_model")}


def training_stages(provenance: dict | None) -> list[dict]:
    """The first one first."""
    if not provenance:
        return []
    arguments, data = dict(provenance["arguments"]), provenance.get("data", {})
    number = arguments.pop("stage", 1)
    files = ", ".join(f"`{Path(name).name}`" for name in data.get("data_files") or [])
    known = {key: value for key, value in arguments.items() if not isinstance(value, dict) and value not in (None, [])}
    lengths = {key: data[key] for key in _lengths(number) if key in data}
    segments = segment_lines(provenance)
    where = f"in {len(segments)} parts" if segments else f"on {_hardware(provenance['machine'])}"
    losses = provenance.get("losses") or []
    n = min(len(losses), CURVE_POINTS)
    shown = [losses[round(at * (len(losses) - 1) / max(1, n - 1))] for at in range(n)]
    stage = {
        "number": number,
        "what": _STAGES[number],
        "steps": provenance.get("steps", "?"),
        "dataset": data.get("dataset"),
        "data": f"`{data['dataset']}`" if data.get("dataset") else files or "data that is not known",
        "time": f"{provenance.get('seconds', 0) / 3600:.2f} h {where}",
        "segments": segments,
        "arguments": yaml.safe_dump(known | lengths, sort_keys=True).strip(),
        "losses": [(step, f"{loss:.3f}") for step, loss in shown],
    }
    return [*training_stages(provenance.get("started_from")), stage]


def segment_lines(provenance: dict) -> list[str]:
    """The parts of a training that went on otherwise than it had begun: where each ran, and what had changed."""
    segments, lines = provenance.get("segments", []), []
    for before, part in zip([None, *segments], segments, strict=False):
        first, last = part["steps"]
        line = f"steps {first} to {last}, {part['seconds'] / 3600:.2f} h on {_hardware(part['machine'])}"
        changed = [] if before is None else _changed(before, part)
        lines.append(": ".join([line, *filter(None, [", ".join(changed)])]))
    return lines


def _changed(before: dict, now: dict) -> list[str]:
    """`key: value` of what is not as it was before; a key that is at its default is not told."""

    def told(segment: dict) -> dict:
        return (
            segment["arguments"] | segment["versions"] | {key: segment[key] for key in ("processes", "git_revision")}
        )

    was, is_ = told(before), told(now)
    return [f"`{key}: {is_.get(key, 'default')}`" for key in sorted(was | is_) if was.get(key) != is_.get(key)]


def _hardware(machine: dict) -> str:
    return f"{machine['gpus']} x {machine['gpu']}" if machine.get("gpu") else machine["processor"]


def _lengths(stage: int) -> tuple[str, ...]:
    return ("sequence_length",) if stage == 1 else ("prompt_length", "generation_length")


def provenance_lines(config, provenance: dict | None) -> list[tuple[str, str]]:
    """(name, value), of what is known."""
    revision, known = config.base_model_revision, provenance or {}
    lines = [("base model", f"{config.base_model_name_or_path}" + (f" at commit {revision}" if revision else ""))]
    lines += [(f"SHA-256 of {name}", f"`{value}`") for name, value in known.get("weights", {}).items()]
    if first := known.get("model", {}).get("speculator"):
        lines.append(("started from", first))
    names = {"base_model_weights": "digest of the base model's weights", "git_revision": "code"}
    lines += [(title, f"`{known[name]}`") for name, title in names.items() if known.get(name)]
    if "versions" in known:
        lines.append(("packages", ", ".join(f"{name} {version}" for name, version in known["versions"].items())))
    if "machine" in known:
        lines.append(("trained", known["machine"]["date"]))
    return lines


def _machine(machine: dict, versions: dict) -> str:
    where = f"{machine_name(machine)}, {machine['date']}"
    return f"{where}, torch {versions['torch']}, transformers {versions['transformers']}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
