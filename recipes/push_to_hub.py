"""A trained speculator to the Hub: its weights, card and code in one commit, and a version on that commit.

python recipes/push_to_hub.py --speculator outputs/llama2-7b/speculator --repo_id my-org/llama2-7b-speculator \\
    --version 1.0.0 --acceptance outputs/acceptance/acceptance.json --latency outputs/latency/latency.json
python recipes/push_to_hub.py --repo_id my-org/llama2-7b-speculator --list

Log in first (`hf auth login`). Interrupted and run again, it goes on. Only --force moves a version that is there.
"""

import argparse
import sys

from modeling_speculator.command_line import GOES_ON, parser_of, run, same_command, say_next
from modeling_speculator.model_cards import list_versions, publish
from modeling_speculator.model_cards.publishing import tag_of


def main() -> None:
    args = parse_args()
    options = {key: value for key, value in vars(args).items() if key not in ("speculator", "repo_id", "list")}
    try:
        if args.list:
            versions = list_versions(args.repo_id)
        else:
            done = publish(args.speculator, args.repo_id, **options)
    except (ValueError, FileNotFoundError):  # of the command's user
        raise
    except Exception as error:  # of the Hub, of its client, or of the network
        sys.exit(f"{type(error).__name__}: {error}\nIt did not come to its end. The same command goes on from there.")
    if args.list:
        print("\n".join(f"{version} {commit}" for version, commit in versions.items()))
        return
    print("\n".join(f"{size:>13,}  {path}" for path, size in sorted(done.files.items())))
    for what, names in ((f"Left out of {args.speculator}", done.left_out), ("Deleted there", done.deleted)):
        if names:
            print(f"{what}: {', '.join(names)}")
    what = "Would be sent to" if args.dry_run else "Sent:" if done.is_new else "Nothing new to send; it is there:"
    print(f"{what} {done.url}" + (f" ({tag_of(args.version)})" if args.version else ""))
    if args.dry_run:
        say_next({"send it": same_command(without="--dry_run")})


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--speculator", metavar="FOLDER", help="what is pushed (default: none, with --list)")
    parser.add_argument("--repo_id", required=True, metavar="ORG/NAME", help="on the Hub")
    parser.add_argument("--version", metavar="VERSION", help="1.0.0 becomes the tag v1.0.0 (default: no tag)")
    none = "for the card (default: none)"
    parser.add_argument("--acceptance", metavar="FILE", help=f"acceptance.json of evaluate_acceptance.py, {none}")
    parser.add_argument("--latency", metavar="FILE", help=f"latency.json of benchmark_latency.py, {none}")
    parser.add_argument("--base_model", metavar="ORG/NAME", help="of the base model (default: what the config names)")
    parser.add_argument(
        "--base_model_revision", metavar="COMMIT", help="of the base model (default: what the config names)"
    )
    parser.add_argument("--license", metavar="NAME", help="as the Hub writes it: apache-2.0, llama2 (default: none)")
    parser.add_argument("--branch", default="main", metavar="NAME", help="nightly, for work in progress")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is seen by you alone")
    parser.add_argument("--message", metavar="TEXT", help="of the commit and the tag (default: its version)")
    parser.add_argument("--force", action="store_true", help="move the tag of a version that is there")
    parser.add_argument("--dry_run", action="store_true", help="show what would be sent")
    parser.add_argument("--list", action="store_true", help="the versions that are there, and their commits")
    args = parser.parse_args()
    if not args.list and args.speculator is None:
        parser.error("--speculator is needed to push; --list only lists")
    return args


if __name__ == "__main__":
    run(main, GOES_ON)
