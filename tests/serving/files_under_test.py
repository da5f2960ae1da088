"""The files that the tests here speak for: `python files_under_test.py FILE` fails unless it records a run of them."""

import hashlib
import json
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
FOLDERS = ("serving", "recipes/serve", "tests/serving")


def digest() -> str:
    """SHA-256 of names and contents."""
    files = sorted(
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    )
    return hashlib.sha256(b"".join(str(file).encode() + (ROOT / file).read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    recorded = Path(sys.argv[1])
    sys.exit(not recorded.is_file() or json.loads(recorded.read_text())["files"] != digest())
