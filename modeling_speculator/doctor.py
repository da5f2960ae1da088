"""Is everything here as this package expects it: the libraries, the machine, a model of one's own?

python -m modeling_speculator.doctor
python -m modeling_speculator.doctor --base_model X --speculator Y

Exit status 1 where something is not. It changes nothing and downloads nothing but the models that are named.
"""

import os
import platform
import shutil
import statistics
import sys
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import transformers_api
from .checks import check_models, main_device
from .command_line import parser_of
from .families import CHAINS, FAMILIES, has_recurrent_state, obstacle, register_family
from .family_proof import ROUNDING, compare_tree, trials
from .loading import load_base_model, load_drafter
from .measuring.benchmarking import machine
from .measuring.oracle import Oracle
from .measuring.parsers import add_loading
from .measuring.prompts import pad_left
from .measuring.quality import compare_greedy
from .precision import faster_of, measure_products
from .transformers_api import attn_implementation


PACKAGES = ("modeling-speculator", "torch", "transformers", "accelerate", "peft", "huggingface-hub", "datasets")
TEXTS = ("Once upon a time, there was", "def quicksort(numbers):", "1, 2, 3, 4, 5, 6,", "Dear Sir or Madam,")
NEW_TOKENS = 64


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--base_model", metavar="FOLDER_OR_ID", help="a model to examine (default: none)")
    parser.add_argument(
        "--speculator",
        metavar="FOLDER_OR_ID",
        help="a speculator for it (default: drafts that are right 7 times in 10)",
    )
    add_loading(parser)
    args = parser.parse_args()
    if args.speculator and not args.base_model:
        parser.error("--speculator is examined beside its --base_model")
    show_versions()
    is_well = show_contract()
    show_machine()
    if args.base_model:
        try:
            model, tokenizer = load_base_model(args.base_model, args.dtype, args.device_map)
            speculator = load_drafter(args.speculator, model) if args.speculator else None
            is_well &= examine(model, tokenizer, speculator)
        except (OSError, ValueError) as error:  # no such model, or one that speculation refuses
            print(f"\n{args.base_model}: {error}")
            is_well = False
    print("\nAll is well." if is_well else "\nNot all is well: see above.")
    sys.exit(not is_well)


# Libraries and machine


def show_versions() -> None:
    print(f"python {platform.python_version()}")
    for name in PACKAGES:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name}: not installed")
    show_vllm()


def show_vllm() -> None:
    """What its plugin says of the one that is installed."""
    if find_spec("vllm") is None:
        print("vllm: not installed")
        return
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="mlp_speculator")
    print(import_module(plugin.module).refusal() or "vllm: serves MLP speculators")


def show_contract() -> bool:
    """Whether each name that nobody promised is as expected."""
    names = transformers_api.USED + transformers_api.DEFINED
    problems = [(entry, entry.problem()) for entry in names]
    is_tested = transformers_api.is_tested()
    releases = f"{transformers_api.OLDEST} to {transformers_api.NEWEST}"
    print(f"\nTested with transformers {releases}: {'this one, too' if is_tested else 'NOT with this one'}.")
    print("What is private there and used here:")
    for entry, problem in problems:
        print(f"  {entry.name}: {problem or 'as expected'}")
    return is_tested and not any(problem for _, problem in problems)


def show_machine() -> None:
    print(f"\n{machine(with_date=False)['processor']}, {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        print(f"GPU {number}: {torch.cuda.get_device_name(number)}, {memory:.0f} GiB")
        devices.append(torch.device("cuda", number))
    for device in devices:
        products = measure_products(device)
        rates = ", ".join(f"{_name(dtype)} {rate / 1e9:,.1f}" for dtype, rate in products.items())
        print(f"Products of matrices on {device}, GFLOP/s: {rates}. {_name(faster_of(products))} is fast here.")
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    print(f"C++ compiler, for compiled steps on a CPU: {compiler or 'none; install g++, or set CXX'}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A base model


def examine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, speculator=None) -> bool:
    """Whether speculation gives this model's own text, as it is loaded; prints what was compared.

    Raises:
        ValueError: where speculation is refused for this model or this speculator.
    """
    config = model.config.get_text_config(decoder=True)
    how = f"{_name(model.dtype)}, {attn_implementation(config)} attention, on {main_device(model)}"
    print(f"\n{type(model).__name__} ({config.model_type}), {how}")
    is_new = config.model_type not in (*FAMILIES, *CHAINS) and obstacle(model) is None
    masks = try_masks(model) if is_new else None
    if is_new and masks is None:
        return False
    try:
        is_well = compare(model, tokenizer, speculator)
    finally:
        if is_new and not is_well:
            del FAMILIES[config.model_type]
    if is_new and is_well:
        print("  It is served with this line, before `generate`:")
        print(f"    modeling_speculator.register_family({config.model_type!r}, {masks!r})")
    return is_well


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, speculator) -> bool:
    """Compares a tree and some texts with plain decoding; of what verifies chains, texts alone, one by one."""
    config = model.config.get_text_config(decoder=True)
    prompts = [encode(text, tokenizer, config.vocab_size) for text in TEXTS]
    by_chains = has_recurrent_state(model)
    batches = [[prompt] for prompt in prompts] if by_chains else [prompts]
    options, rows = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}, []
    with tqdm(desc="examining", total=1 + len(batches), unit="part", leave=False) as progress:
        tree = None
        for batch in batches:
            input_ids, mask = (part.to(main_device(model)) for part in pad_left(batch))
            drafter = speculator
            if drafter is None:
                plain = model.generate(input_ids, attention_mask=mask, do_sample=False, **options)
                drafter = Oracle(model, plain, mask, p_right=0.7, n_candidates=1 if by_chains else 5)
            check_models(model, drafter)
            if tree is None and not by_chains:
                tree = compare_tree(model, torch.tensor(prompts[:1], device=main_device(model)))
                progress.update()
            rows += compare_greedy(model, drafter, input_ids, mask, **options)
            progress.update()
        largest = tree.largest if tree else largest_logit(model, input_ids)
    if tree:
        print(f"  A tree's logits are those of each path up to {tree.difference:.1e}, of up to {tree.largest:.1f}.")
        print(f"  Another token is the most probable at {tree.other_choices} of {tree.nodes} nodes.")
    else:
        print("  It has a recurrent state, and verifies chains: `speculator.config.n_candidates = 1`.")
    same, yields = sum(row.identical for row in rows), statistics.mean(row.tokens_per_step for row in rows)
    print(f"  Greedy texts of {NEW_TOKENS} tokens that are the same with a speculator: {same} of {len(rows)}.")
    drafts = "the speculator's drafts" if speculator else "drafts that are right 7 times in 10"
    print(f"  ({yields:.2f} tokens per step, with {drafts}.)")
    margin = max([tree.margin if tree else 0.0, *(row.gap for row in rows if not row.identical)])
    if margin > ROUNDING * largest:
        print(
            f"  They part where plain decoding prefers its own token by up to {margin:.1e}, which is no rounding. "
            "Something in this model looks at how many tokens are run, or only at the last one: an adapter, a hook, "
            "activations that are quantized by tensor. Take it out, or generate without `assistant_model`."
        )
        return False
    if same < len(rows):
        print(
            f"  They part where plain decoding prefers its own token by {margin:.1e} at most: rounding, as between "
            "any two batch sizes."
        )
    return True


@torch.no_grad()
def largest_logit(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """After a prompt (1, length)."""
    return float(model(input_ids=input_ids).logits.float().abs().max())


def try_masks(model: PreTrainedModel) -> str | None:
    """With which masks a base model of an unknown type decodes a tree as it decodes plainly, if any; registers it so,
    and prints what differs with others."""
    config = model.config.get_text_config(decoder=True)
    print(f"  The model type {config.model_type!r} is not known. Its layers, tried on a tree after random tokens:")
    for trial in trials(model):
        print(f"    masks {trial.masks!r}: {trial.said}")
        if trial.is_right:
            register_family(config.model_type, trial.masks)
            return trial.masks
    print("  None of these is what plain decoding computes: it can't be served.")
    return None


def encode(text: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Token ids that the model has; one at least."""
    return [min(token, vocab_size - 1) for token in tokenizer(text)["input_ids"]] or [0]


if __name__ == "__main__":
    main()
