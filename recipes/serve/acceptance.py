"""What a speculator achieves in a vLLM server, from its /metrics: tokens per step, and acceptance by position.

python recipes/serve/acceptance.py                                    since the server started
python recipes/serve/acceptance.py --url http://host:8000 --seconds 60    of the next minute's requests
"""

import re
import time
import urllib.request
from collections import Counter

from modeling_speculator.command_line import parser_of, positive_number, run


COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+)_total\{(.*)\} (\S+)$", re.MULTILINE)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--url", default="http://localhost:8000", metavar="URL", help="of the server")
    parser.add_argument(
        "--seconds", type=positive_number, metavar="SECONDS", help="to count for (default: since the server started)"
    )
    args = parser.parse_args()
    counts = read_counters(args.url)
    if args.seconds:
        before = counts
        time.sleep(args.seconds)
        counts = read_counters(args.url)
        counts.subtract(before)
    if not (drafts := counts["drafts"]):
        raise ValueError(f"{args.url} has drafted nothing in that time. Send it some requests.")
    positions = sorted(key for key in counts if isinstance(key, int))
    shares = " / ".join(f"{100 * counts[position] / drafts:.0f}" for position in positions)
    print(
        f"{drafts:.0f} steps, {1 + counts['accepted_tokens'] / drafts:.2f} tokens per step; drafts accepted at "
        f"positions {' '.join(str(position + 1) for position in positions)}: {shares} %"
    )


def read_counters(url: str) -> Counter:
    """Steps (`drafts`), `accepted_tokens`, and those of each position, from 0; of all engines and models together.

    Raises:
        ValueError: if the server has none.
    """
    with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    counts = Counter()
    for name, labels, value in COUNTER.findall(metrics):
        position = re.search(r'position="(\d+)"', labels)
        counts[int(position[1]) if position else name] += float(value)
    if "drafts" not in counts:
        raise ValueError(f"{url}/metrics counts no drafts: it is no vLLM server with a speculator.")
    return counts


if __name__ == "__main__":
    run(main)
