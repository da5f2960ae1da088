"""What README and docs show is run here, on models that are here, and what they name is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, character_tokenizer, tiny_model

from modeling_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from modeling_speculator.trainers import parse_recipe


ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "recipes").glob("**/*.md")),
    ]
}
# Python that goes on from one page to the next.
IN_ORDER = "".join(PAGES[name] for name in ("README.md", "docs/generate.md", "docs/measure.md"))


def test_the_code_on_generation(tmp_path, capsys):
    """All of it, one block after another, as a reader would paste it."""
    base_model, speculator = str(tmp_path / "base_model"), str(tmp_path / "speculator")
    tiny_model("llama").save_pretrained(base_model)
    character_tokenizer(eos_token="z").save_pretrained(base_model)
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(vocab_size=VOCAB, emb_dim=32, base_model_name_or_path=base_model)
    MLPSpeculatorPreTrainedModel(config).save_pretrained(speculator)

    blocks = re.findall(r"```python\n(.*?)```", IN_ORDER, re.DOTALL)
    assert len(blocks) == 10
    names = r'"meta-llama/[^"]*", "ibm-ai-platform/[^"]*"'
    assert re.search(names, blocks[0])
    variables = {}
    exec(re.sub(names, repr((base_model, speculator)), blocks[0]), variables)
    assert "steps=" in capsys.readouterr().out
    for block in blocks[1:]:
        exec(block, variables)
    plain = variables["model"].generate(**variables["inputs"], max_new_tokens=40, do_sample=False)
    assert variables["out"].sequences.tolist() == plain.tolist()
    assert variables["cache"].get_seq_length() == variables["text"].shape[1] - 1


@pytest.mark.parametrize("page", PAGES)
def test_python_is_run_or_imports(page):
    """What goes on from the README is run above; of other blocks the imports, or all, if there are none."""
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        if code not in IN_ORDER:
            imports = re.findall(r"^(?:from|import) .*", code, re.MULTILINE)
            exec("\n".join(imports) or code)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 12_000


def test_every_file_of_the_tree_is_there():
    (tree,) = re.findall(r"```\n(modeling_speculator/ .*?)```", PAGES["docs/develop.md"], re.DOTALL)
    folder, named = None, set()
    for line in tree.splitlines():
        if line.startswith("  "):
            named |= {f"{folder}/{name}" for name in re.findall(r"\w+\.py\b", line)}
        else:
            folder = line.split("/ ")[0]
    for folder in ("modeling_speculator", "modeling_speculator/measuring", "trainers", "model_cards", "recipes"):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}/__init__.py"}
        assert {name for name in named if Path(name).parent == Path(folder)} == files


def commands(pattern: str) -> list[str]:
    """Those of all pages that begin so."""
    return [
        command.replace("\\\n", " ")
        for page in PAGES.values()
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for command in re.findall(rf"^({pattern}(?:.*\\\n)*.*)$", block, re.MULTILINE)
    ]


COMMANDS = commands(r"(?:.*\\\n)*.*train_speculator\.py")
OTHERS = commands(r"python recipes/(?!train_speculator)")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_train(command, tmp_path):
    """Every file that they name is there, and every flag and value is one that the script takes."""
    words = shlex.split(command)
    files = [word for word in words if word.startswith("recipes/")]
    assert all((ROOT / file).is_file() for file in files)
    config = words.index("--config")
    words[config + 1] = str(ROOT / words[config + 1])
    model, data, args = parse_recipe(words[config:])
    assert model.base_model
    assert (data.dataset is None) != (data.data_files is None)


def test_there_are_commands():
    assert len(COMMANDS) >= 9 and len(OTHERS) >= 9


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_have_the_flags_that_are_shown(command):
    words = shlex.split(command)
    script = (ROOT / words[1]).read_text()
    if "measuring.parsers" in script:
        script += (ROOT / "modeling_speculator/measuring/parsers.py").read_text()
    known = set(re.findall(r'"(--\w+)"', script))
    assert {word for word in words if word.startswith("--")} <= known


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page):
            target = (ROOT / name).parent / link if link else ROOT / name
            assert link.startswith("https://") or target.exists(), (name, link)
            if heading and not link.startswith("https://"):
                assert heading in anchors(target), (name, link, heading)


def anchors(page: Path) -> list[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_a_page_answers_a_question_and_begins_with_the_command():
    for name, page in PAGES.items():
        if name.startswith("docs/"):
            question, _, rest = page.partition("\n")
            assert question.startswith("# ") and question.endswith("?"), name
            assert rest.strip().startswith("```bash"), name
