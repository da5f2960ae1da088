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
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from . import transformers_api
from .attention import tree_attention
from .cache import SpeculativeCache
from .candidate_tree import CandidateTree
from .checks import check_models, main_device
from .command_line import parser_of
from .families import attention_windows
from .loading import load_base_model, load_drafter
from .measuring.benchmarking import machine
from .measuring.oracle import Oracle
from .measuring.parsers import add_loading
from .measuring.prompts import pad_left
from .measuring.quality import compare_greedy
from .precision import faster_of, measure_products
from .transformers_api import CACHE, attn_implementation, cache_of


PACKAGES = ("modeling-speculator", "torch", "transformers", "accelerate", "peft", "huggingface-hub", "datasets")
TEXTS = ("Once upon a time, there was", "def quicksort(numbers):", "1, 2, 3, 4, 5, 6,", "Dear Sir or Madam,")
NEW_TOKENS = 64
# Of the largest logit: where plain decoding prefers its own token by less than that, rounding may decide. Coarse
# rounding is torchao's int8 with a scale a token: stories260K, with logits up to 16, parted at margins of up to 0.23.
ROUNDING = 0.02


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


@dataclass(frozen=True)
class TreeReport:
    """How a tree's logits differ from those that plain decoding has for each path.

    difference, largest: the largest difference of a logit, and the largest logit.
    nodes, other_choices: how many were compared, and at how many another token is the most probable.
    margin: by how much plain decoding prefers its own there, at most.
    """

    difference: float
    largest: float
    nodes: int
    other_choices: int
    margin: float


def examine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, speculator=None) -> bool:
    """Whether speculation gives this model's own text, as it is loaded; prints what was compared.

    Raises:
        ValueError: where speculation is refused for this model or this speculator.
    """
    config = model.config.get_text_config(decoder=True)
    how = f"{_name(model.dtype)}, {attn_implementation(config)} attention, on {main_device(model)}"
    print(f"\n{type(model).__name__} ({config.model_type}), {how}")
    prompts = [encode(text, tokenizer, config.vocab_size) for text in TEXTS]
    input_ids, mask = (part.to(main_device(model)) for part in pad_left(prompts))
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    drafter = speculator
    with tqdm(desc="examining", total=3, unit="part", leave=False) as progress:
        if drafter is None:
            plain = model.generate(input_ids, attention_mask=mask, do_sample=False, **options)
            drafter = Oracle(model, plain, mask, p_right=0.7)
        check_models(model, drafter)
        progress.update()
        tree = compare_tree(model, torch.tensor(prompts[:1], device=main_device(model)))
        progress.update()
        rows = compare_greedy(model, drafter, input_ids, mask, **options)
        progress.update()
    print(f"  A tree's logits are those of each path alone up to {tree.difference:.1e}, of up to {tree.largest:.1f}.")
    print(f"  Another token is the most probable at {tree.other_choices} of {tree.nodes} nodes.")
    same, yields = sum(row.identical for row in rows), statistics.mean(row.tokens_per_step for row in rows)
    print(f"  Greedy texts of {NEW_TOKENS} tokens that are the same with a speculator: {same} of {len(rows)}.")
    drafts = "the speculator's drafts" if speculator else "drafts that are right 7 times in 10"
    print(f"  ({yields:.2f} tokens per step, with {drafts}.)")
    margin = max([tree.margin, *(row.gap for row in rows if not row.identical)])
    if margin > ROUNDING * tree.largest:
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


def encode(text: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Token ids that the model has; one at least."""
    return [min(token, vocab_size - 1) for token in tokenizer(text)["input_ids"]] or [0]


@torch.no_grad()
def compare_tree(model: PreTrainedModel, prompt: torch.Tensor, n_candidates: int = 5, depth: int = 3) -> TreeReport:
    """Verifies a random tree after a prompt (1, length), and decodes each of its paths plainly."""
    config, length, device = model.config.get_text_config(decoder=True), prompt.shape[1], prompt.device
    generator = torch.Generator().manual_seed(0)
    root = torch.randint(config.vocab_size, (1, 1), generator=generator).to(device)
    candidates = torch.randint(config.vocab_size, (1, n_candidates, depth), generator=generator)
    candidates[0, :, 0] = torch.randperm(config.vocab_size, generator=generator)[:n_candidates]  # none share a prefix
    candidates = candidates.to(device)
    max_nodes = 1 + n_candidates * depth
    tree = CandidateTree.merge(root, candidates, max_nodes)

    past = SpeculativeCache(config.num_hidden_layers, length + max_nodes, attention_windows(config))
    model(input_ids=prompt, use_cache=True, **{CACHE: past})
    past.start_steps(torch.ones_like(prompt), max_nodes)
    with tree_attention(model):
        mask = past.prepare_step(tree, torch.full((1, 1), length, device=device), length + max_nodes)
        positions = length + tree.depths
        logits = model(input_ids=tree.input_ids, attention_mask=mask, position_ids=positions, **{CACHE: past}).logits[
            0
        ]

    differences, sizes, margins, nodes = [], [], [], 0
    for number, candidate in enumerate(candidates[0]):
        # Nodes are numbered level by level.
        path = [0, *(1 + number + level * n_candidates for level in range(depth))]
        plain = decode_path(model, prompt, torch.cat([root[0], candidate]))
        drafted = logits[path].float()
        choice, best = drafted.argmax(-1), plain.max(-1)
        differences.append((drafted - plain).abs().max())
        sizes.append(plain.abs().max())
        margins.append(best.values - plain.gather(1, choice[:, None])[:, 0])
        nodes += len(path)
    margins = torch.cat(margins)
    return TreeReport(
        float(max(differences)), float(max(sizes)), nodes, int((margins > 0).sum()), float(margins.max())
    )


def decode_path(model: PreTrainedModel, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logits after each of some tokens (n,), run one by one as `generate` does: (n, vocab), float32."""
    past = DynamicCache(config=model.config.get_text_config(decoder=True))
    past = cache_of(model(input_ids=prompt, use_cache=True, **{CACHE: past}))
    logits = []
    for token in tokens:
        outputs = model(input_ids=token.view(1, 1), use_cache=True, **{CACHE: past})
        past = cache_of(outputs)
        logits.append(outputs.logits[0, -1].float())
    return torch.stack(logits)


if __name__ == "__main__":
    main()
