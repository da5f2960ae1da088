"""Ways to decode that are compared with one another: what each hands to `generate`, or why it can't run."""

import math
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..drafters import dials_of, is_drafter
from ..modeling_prompt_lookup import PromptLookup
from ..transformers_api import compile_on_any_device


# Those of transformers; speculators and draft models go by the names that they are given.
METHODS = ("generate", "prompt_lookup", "draft_model", "early_exit", "mtp", "dflash")
LOOKUP = "lookup"  # by our loop; with `+` after a speculator's name, in its tree
FORMS = ("static", "compiled")  # a prefix: "compiled:generate"
LOOKUP_TOKENS = 10  # as in transformers' documentation


@dataclass(frozen=True)
class Method:
    """
    name: as asked for.
    options: of `generate`.
    drafter, dials: a speculator, and what its config is to say for the time of a call.
    is_stock: whether it is assisted generation of transformers' own.
    reason: why it can't run; None where it can.
    """

    name: str
    options: dict = field(default_factory=dict)
    drafter: PreTrainedModel | None = None
    dials: dict = field(default_factory=dict)
    is_stock: bool = False
    reason: str | None = None


def expand_methods(
    names: list[str],
    model: PreTrainedModel,
    drafters: dict[str, PreTrainedModel],
    n_candidates: list[int] | None = None,
    batch_size: int = 1,
) -> list[Method]:
    """Methods by name, a speculator's once for every number of candidates.

    Args:
        drafters: {name: a speculator, or a language model that drafts}; one named "dflash" drafts by blocks.
        n_candidates: to draft with; default: each speculator's own dials.

    Raises:
        ValueError: for an unknown name; the known ones are listed.
    """
    methods, drafters = [], drafters | {LOOKUP: PromptLookup(LOOKUP_TOKENS)}
    for name in names:
        form, _, what = name.rpartition(":")
        branch = what.endswith(f"+{LOOKUP}")
        what = what.removesuffix(f"+{LOOKUP}")
        if (
            what not in (*METHODS, *drafters)
            or form not in ("", *FORMS)
            or (branch and not is_drafter(drafters.get(what)))
        ):
            known = [*METHODS, *(drafter for drafter in drafters if drafter not in METHODS)]
            raise ValueError(
                f"There is no method {name!r}, only {', '.join(known)}; generate and speculators also with a static "
                f"cache, {' or '.join(f'{form}:generate' for form in FORMS)}; speculators also as speculator+{LOOKUP}."
            )
        options = _form_options(form)
        if what == "generate":
            methods.append(Method(name, options))
        elif is_drafter(drafters.get(what)):
            drafter = drafters[what]
            options["assistant_model"] = drafter
            its_own = n_candidates is None or what == LOOKUP
            every = [dials_of(drafter)] if its_own else [_dials(drafter, k) for k in n_candidates]
            more = {"n_lookup_tokens": LOOKUP_TOKENS} if branch else {}
            methods += [Method(name, options, drafter, dials | more) for dials in every]
        else:
            reason = _why_not(what, form, model, drafters, batch_size)
            methods.append(Method(name, options | _options(what, model, drafters), is_stock=True, reason=reason))
    return methods


def _form_options(form: str) -> dict:
    if not form:
        return {}
    if form == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    return {"cache_implementation": "static", "compile_config": compile_on_any_device()}


def _options(what: str, model: PreTrainedModel, drafters: dict[str, PreTrainedModel]) -> dict:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    known = {
        "prompt_lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
        "early_exit": {"assistant_early_exit": max(1, layers // 2)},
        "mtp": {"use_mtp": True},
        "dflash": {"assistant_model": drafters.get(what), "speculation_type": "dflash"},
    }
    return known.get(what, {"assistant_model": drafters.get(what)})


def _why_not(what: str, form: str, model: PreTrainedModel, drafters: dict, batch_size: int) -> str | None:
    """Why assisted generation of transformers can't run, before it is tried."""
    if what in ("draft_model", "dflash") and what not in drafters:
        return "no such drafter was given"
    if what == "mtp" and not getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None):
        return "the base model has no layers that predict several tokens"
    if batch_size > 1:
        return "transformers' assisted generation takes one sequence at a time"
    if form:
        return "transformers' assisted generation takes no static cache"
    return None


def _dials(drafter: PreTrainedModel, n_candidates: int) -> dict:
    """`n_candidates`, with as many more children for the first node as it takes to have so many leaves."""
    dials = dials_of(drafter)
    top_k = list(dials["top_k_tokens_per_head"])
    top_k[0] = max(top_k[0], math.ceil(n_candidates / math.prod(top_k[1 : dials["n_heads"]])))
    return dials | {"top_k_tokens_per_head": top_k, "n_candidates": n_candidates, "n_tree_nodes": None}
