"""Prompts to train on, without a download: templates, filled from the documentation of Python's standard library and
from lists of subjects.

python recipes/smollm2-135m/write_prompts.py

The documentation is that of the Python that runs this (PSF License 2.0); the rest is this file's own. Where the Hub
can be reached, prompts of people are better: `--prompts openai/gsm8k:main:train` of the recipe takes those of a
dataset.
"""

import importlib
import inspect
import json
import random
import sys
import warnings
from pathlib import Path

from modeling_speculator.command_line import output_file, parser_of, positive, run, say_end


PASSAGE = 120, 900  # characters of what is quoted
SUBJECTS = """
the moon; photosynthesis; the French Revolution; a lighthouse keeper; black holes; bread; chess; the Amazon
rainforest; volcanoes; jazz; the stock market; vaccines; bicycles; coral reefs; medieval castles; artificial
intelligence; honey bees; the Great Wall of China; earthquakes; coffee; the human heart; trains; Shakespeare;
recycling; sleep; dragons; renewable energy; the Roman Empire; penguins; gravity; public libraries; the Olympic
Games; glaciers; the printing press; migration of birds; antibiotics; democracy; origami; deserts; the periodic
table; friendship; electric cars; tea; rivers; inflation; dinosaurs; the speed of light; gardening; robots; the
Silk Road; meditation; mathematics; pirates; rain; memory; the internet; mountains; cooking pasta; the violin;
evolution; a haunted house; satellites; wolves; poetry; probability; the ocean floor; museums; a lost letter;
supply and demand; chocolate; time travel; the immune system; bridges; the Sahara; a small village; photography;
climate change; elephants; philosophy; a detective; swimming; the brain; paper; windmills; language learning;
soil; an old clock; football; DNA; lightning; the Renaissance; a space station; solar panels; money; friend who
moves away; whales; steam engines; remote work; a job interview; marathon running; the night sky
"""
ABOUT = """
Explain {a} in simple words.; Write a short story about {a} and {b}.; What are the most important facts about
{a}?; Compare {a} with {b}.; Give me five interesting ideas for a blog post about {a}.; Write a poem about {a}.;
What are the advantages and disadvantages of {a}?; How would you explain {a} to a five-year-old child?; Write a
polite e-mail to a colleague about {a}.; Why is {a} important for people today?; Write an outline of a talk on
{a}.; Pretend to be a teacher and introduce {a} to your class.; What do {a} and {b} have in common?; Who should
know about {a}?; List ten questions that a beginner may ask about {a}, and answer the first three.; Tell me a
joke about {a}.; Write a dialogue between two friends who talk about {a}.; Summarize the history of {a}.;
Describe {a} in one paragraph.; Make a table of three pros and three cons of {a}.; What is a common mistake
about {a}?; When did people begin to study {a}?; Where can I learn more about {a}?; Write a product description
that mentions {a}.
"""
SUMS = """
{n} has {x} apples and buys {y} bags with {z} apples each. How many apples does {n} have now?; A train travels
{x} miles in the first hour and {y} miles in each of the next {z} hours. How far does it travel in all?; {n}
earns ${x} an hour and works {y} hours a day. How much does {n} earn in {z} days?; A box holds {x} pencils. {n}
buys {y} boxes and gives away {z} pencils. How many pencils are left?; {n} reads {x} pages every day. The book
has {y} pages, of which {z} have been read. How many days will the rest take?; There are {x} rows of {y} chairs
in a hall. {z} of the chairs are taken. How many are free?; {n} saves ${x} every week. How much is saved after
{y} weeks, if ${z} are spent on a present?; A farmer has {x} cows and {y} times as many sheep. After selling {z}
sheep, how many animals are left?; What is {x} plus {y} times {z}? Show the steps.; If 3 times a number plus {x}
is {y}, what is the number?
"""
NAMES = ["Natalia", "Ben", "Amira", "Tom", "Wei", "Julia", "Omar", "Lena", "Carlos", "Priya", "Hannah", "Kofi"]
QUOTING = (
    "Summarize the following text:\n{text}",
    "{text}\n\nWhat is this text about? Answer in two sentences.",
    "Rewrite this so that a beginner understands it:\n\n{text}",
    "Give a short title and three key points for this passage:\n{text}",
    "Here is some documentation:\n\n{text}\n\nQuestion: when would I use this?",
    "Translate this into German:\n{text}",
    "Extract the names that are mentioned in this text as a list.\n\n{text}",
)
CODING = (
    "What does `{name}` do in Python?",
    "Show an example of how to use `{name}` in Python, and explain it.",
    "Write a Python function that does what this says: {first}",
    "Explain `{name}` to somebody who knows another programming language.",
    "Which errors can happen when I call `{name}`, and how do I handle them?",
    "Write a unit test for `{name}`.",
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=positive, default=8000, metavar="PROMPTS", help="to write")
    parser.add_argument("--seed", type=int, default=0, metavar="NUMBER", help="another one makes other prompts")
    parser.add_argument(
        "--output",
        type=output_file,
        default=Path("outputs/smollm2-135m/prompts.jsonl"),
        metavar="FILE",
        help="for the prompts, a JSON object a line",
    )
    args = parser.parse_args()
    chance, documented = random.Random(args.seed), list(documentation())
    kinds = {"subjects": about, "sums": sums, "quoting": quoting, "coding": coding}
    prompts = {}
    while len(prompts) < args.prompts:
        kind = chance.choice(list(kinds))
        prompts.setdefault(kinds[kind](chance, documented), kind)
    lines = [json.dumps({"prompt": prompt, "category": kind}) for prompt, kind in prompts.items()]
    args.output.write_text("\n".join(lines) + "\n")
    say_end(args.output)


def listed(text: str) -> list[str]:
    """What semicolons part."""
    return " ".join(text.split()).split("; ")


def about(chance: random.Random, _) -> str:
    a, b = chance.sample(listed(SUBJECTS), 2)
    return chance.choice(listed(ABOUT)).format(a=a, b=b)


def sums(chance: random.Random, _) -> str:
    x, y, z = chance.randint(3, 90), chance.randint(2, 400), chance.randint(2, 12)
    return chance.choice(listed(SUMS)).format(n=chance.choice(NAMES), x=x, y=y, z=z)


def quoting(chance: random.Random, documented: list[tuple[str, str]]) -> str:
    _, text = chance.choice([some for some in documented if len(some[1]) >= PASSAGE[0]])
    return chance.choice(QUOTING).format(text=text[: PASSAGE[1]].rpartition(" ")[0])


def coding(chance: random.Random, documented: list[tuple[str, str]]) -> str:
    name, text = chance.choice(documented)
    return chance.choice(CODING).format(name=name, first=text.split("\n\n")[0])


def documentation():
    """Names of the standard library, and what it says of them, in the order of the alphabet."""
    known = set()
    for module_name in sorted(sys.stdlib_module_names):
        if module_name.startswith("_") or module_name in ("antigravity", "this", "idlelib", "lib2to3", "test"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                module = importlib.import_module(module_name)
        except Exception:  # of another platform, or not built in
            continue
        members = [(module_name, module)]
        for name, member in sorted(vars(module).items()):
            if not name.startswith("_") and getattr(member, "__module__", None) == module_name:
                members.append((f"{module_name}.{name}", member))
        for name, member in members:
            text = inspect.getdoc(member) if callable(member) or inspect.ismodule(member) else None
            if text and len(text) > 20 and text not in known:
                known.add(text)
                yield name, text


if __name__ == "__main__":
    run(main)
