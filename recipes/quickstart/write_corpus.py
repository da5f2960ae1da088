"""Splits the source code of this interpreter's standard library into files to train on and files held out.

python recipes/quickstart/write_corpus.py --output_dir outputs/quickstart/corpus
python recipes/quickstart/write_corpus.py --output_dir outputs/stories/corpus --texts stories.jsonl
"""

import json
import sysconfig
from pathlib import Path

from modeling_speculator.command_line import command_of, parser_of, run, say_end
from modeling_speculator.measuring.text_files import rows_of


# Tests, tables of data, and folders that other packages are installed into.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"}
LONGEST = 200_000  # bytes; what is longer is generated
HELD_OUT_EVERY = 20  # files


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="for train.jsonl, held_out.jsonl"
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="jsonl with `text`, to split (default: the standard library)"
    )
    args = parser.parse_args()
    rows = library() if args.texts is None else texts_of(args.texts)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write(args.output_dir / "train.jsonl", [row for index, row in enumerate(rows) if index % HELD_OUT_EVERY])
    write(args.output_dir / "held_out.jsonl", rows[::HELD_OUT_EVERY])
    model = {"corpus": args.output_dir / "train.jsonl", "output_dir": args.output_dir.with_name("base_model")}
    then = {"a base model": command_of("quickstart/train_base_model.py", **model)}
    say_end(args.output_dir / "train.jsonl", args.output_dir / "held_out.jsonl", then=then)


def library() -> list[dict]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts) and path.stat().st_size <= LONGEST
    )
    return [
        {"file": str(p.relative_to(root)), "text": p.read_text(encoding="utf-8-sig", errors="replace")} for p in paths
    ]


def texts_of(path: Path) -> list[dict]:
    rows = list(rows_of(path))
    for number, row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{path}, line {number}: `text` is missing or not a text; there are {sorted(row)}.")
    if not rows:
        raise ValueError(f"{path} holds nothing to split.")
    return [row for _, row in rows]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} files, {sum(len(row['text']) for row in rows) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
