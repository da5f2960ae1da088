"""What every measuring command is told: models, prompts, loads."""

import argparse

from ..command_line import count, parser_of, positive, top_p


def measuring_parser(doc: str, needs_speculator: bool = True) -> argparse.ArgumentParser:
    """`parser_of` with what every measurement is told: the models, how they are loaded, and the prompts."""
    parser = parser_of(doc)
    parser.add_argument("--base_model", required=True, help="folder or Hub id")
    parser.add_argument("--speculator", required=needs_speculator, help="folder or Hub id of a speculator for it")
    parser.add_argument("--prompts", required=True, help="file or dataset, see evaluate_acceptance.py")
    parser.add_argument("--dtype", default="auto", help="of all models; default: as the base model was saved")
    parser.add_argument("--device_map", help='"auto" spreads the base model; default: one device')
    return parser


def continuing_parser(doc: str) -> argparse.ArgumentParser:
    """`measuring_parser` of a command that continues every prompt, and how it does."""
    parser = measuring_parser(doc)
    parser.add_argument("--limit", type=positive, help="prompts, spread evenly; default: all")
    parser.add_argument("--leave_out_long", action="store_true", help="prompts that the context has no room for")
    parser.add_argument("--chat", action="store_true", help="put prompts into the base model's chat template")
    parser.add_argument("--max_new_tokens", type=positive, default=128)
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--top_p", type=top_p, default=1.0)
    parser.add_argument("--top_k", type=count, default=0, help="0: all tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def timing_parser(
    doc: str, n_prompts: int, max_new_tokens: int, rounds: int, needs_speculator: bool = True
) -> argparse.ArgumentParser:
    """`measuring_parser` of a command that takes times at several loads; the numbers are defaults."""
    parser = measuring_parser(doc, needs_speculator)
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="loads to look at")
    parser.add_argument(
        "--prompt_length", type=positive, nargs="+", default=[64], help="tokens, from the middle of texts"
    )
    parser.add_argument("--n_prompts", type=positive, default=n_prompts, help="of each load")
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens)
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--threads", type=positive, help="of a CPU")
    return parser
