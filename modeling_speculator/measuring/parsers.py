"""What every measuring command is told: models, prompts, loads."""

import argparse

from ..command_line import count, parser_of, positive, top_p


def measuring_parser(doc: str, needs_speculator: bool = True) -> argparse.ArgumentParser:
    """`parser_of` with what every measurement is told: the models, how they are loaded, and the prompts."""
    parser = parser_of(doc)
    without = "" if needs_speculator else " (default: none)"
    parser.add_argument("--base_model", required=True, metavar="FOLDER_OR_ID", help="the model to measure with")
    parser.add_argument(
        "--speculator", required=needs_speculator, metavar="FOLDER_OR_ID", help=f"a speculator for it{without}"
    )
    parser.add_argument(
        "--prompts", required=True, metavar="FILE_OR_ID", help="as evaluate_acceptance.py --help describes them"
    )
    add_loading(parser)
    return parser


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The options of how models are loaded."""
    parser.add_argument(
        "--dtype", default="auto", metavar="DTYPE", help="of all models; auto: as the base model was saved"
    )
    parser.add_argument("--device_map", metavar="MAP", help="auto spreads the base model (default: one device)")


def continuing_parser(doc: str) -> argparse.ArgumentParser:
    """`measuring_parser` of a command that continues every prompt, and how it does."""
    parser = measuring_parser(doc)
    parser.add_argument("--limit", type=positive, metavar="PROMPTS", help="so many, spread evenly (default: all)")
    parser.add_argument("--leave_out_long", action="store_true", help="leave out what the context has no room for")
    parser.add_argument("--chat", action="store_true", help="put prompts into the base model's chat template")
    parser.add_argument("--max_new_tokens", type=positive, default=128, metavar="TOKENS", help="after each prompt")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="PROMPTS", help="continued at once")
    parser.add_argument("--top_p", type=top_p, default=1.0, metavar="SHARE", help="of the probability, to sample from")
    parser.add_argument("--top_k", type=count, default=0, metavar="TOKENS", help="to sample from; 0: all")
    parser.add_argument("--seed", type=int, default=0, metavar="NUMBER", help="of what is sampled")
    return parser


def timing_parser(
    doc: str, n_prompts: int, max_new_tokens: int, rounds: int, needs_speculator: bool = True
) -> argparse.ArgumentParser:
    """`measuring_parser` of a command that takes times at several loads; the numbers are defaults."""
    parser = measuring_parser(doc, needs_speculator)
    parser.add_argument(
        "--batch_size", type=positive, nargs="+", default=[1], metavar="PROMPTS", help="continued at once: the loads"
    )
    parser.add_argument(
        "--prompt_length",
        type=positive,
        nargs="+",
        default=[64],
        metavar="TOKENS",
        help="of a prompt, from the middle of texts",
    )
    parser.add_argument(
        "--n_prompts", type=positive, default=n_prompts, metavar="PROMPTS", help="of each load, in whole batches"
    )
    parser.add_argument(
        "--max_new_tokens", type=positive, default=max_new_tokens, metavar="TOKENS", help="after each prompt"
    )
    parser.add_argument(
        "--rounds", type=positive, default=rounds, metavar="ROUNDS", help="of timed runs, whose median counts"
    )
    parser.add_argument("--threads", type=positive, metavar="THREADS", help="of a CPU (default: torch's choice)")
    return parser
