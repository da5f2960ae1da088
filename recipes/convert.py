"""Writes a speculator of any published form in the form that another engine reads.

python recipes/convert.py --speculator outputs/quickstart/speculator --to arctic --output outputs/arctic
python recipes/convert.py --speculator Snowflake/Arctic-LSTM-Speculator-Llama-3.1-8B-Instruct --to mlp_speculator \\
    --output outputs/llama3.1-8b

mlp_speculator: the published form (safetensors), which this package, vLLM up to 0.9.2 and TGI know. arctic: that of
Arctic Inference, which serves its speculators in vLLM.
"""

import argparse
from pathlib import Path

from transformers import AutoConfig, AutoModel

import modeling_speculator  # noqa: F401  (registers the model types)
from modeling_speculator.formats import save_arctic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speculator", required=True, help="folder or Hub id")
    parser.add_argument("--revision", help="of it on the Hub")
    parser.add_argument("--to", required=True, choices=["mlp_speculator", "arctic"])
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--base_model_archs", nargs="+", help="arctic: base models' classes; default: its own's")
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: take a new folder.")
    speculator = AutoModel.from_pretrained(args.speculator, revision=args.revision)
    if args.to == "mlp_speculator":
        speculator.save_pretrained(args.output)
    else:
        save_arctic(speculator, args.output, args.base_model_archs or architectures_of_base(speculator.config))
    AutoModel.from_pretrained(args.output)  # what was written loads
    print(f"Written: {', '.join(str(path) for path in sorted(args.output.iterdir()))}")


def architectures_of_base(config) -> list[str]:
    """Of the base model that a speculator was trained for, as its config names it."""
    known = getattr(config, "base_model_archs", None)
    if known:
        return known
    if config.base_model_name_or_path is None:
        raise ValueError("The speculator does not say which base model it is for: give --base_model_archs.")
    return AutoConfig.from_pretrained(config.base_model_name_or_path).architectures


if __name__ == "__main__":
    main()
