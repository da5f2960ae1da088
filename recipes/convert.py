"""Writes a speculator of any published form in the form that another engine reads.

python recipes/convert.py --speculator outputs/quickstart/speculator --to arctic --output outputs/arctic
python recipes/convert.py --speculator Snowflake/Arctic-LSTM-Speculator-Llama-3.1-8B-Instruct --to mlp_speculator \\
    --output outputs/converted

mlp_speculator: the published form, in safetensors. This package knows it, and so do vLLM up to 0.9.2 and TGI, but for
gated ones. arctic: that of Arctic Inference, which serves either in vLLM. modeling_speculator: this package's form, of
what others publish: EAGLE, EAGLE-3 and Medusa heads. (They draft here as they are; to train them on, or to push them
to the Hub, they must be in that form.)
"""

from pathlib import Path

from transformers import AutoModel

from modeling_speculator.command_line import command_of, output_folder, parser_of, run, say_end
from modeling_speculator.formats import save_arctic
from modeling_speculator.loading import base_model_config, check_is_hub_id, load_base_model, speculator_config
from modeling_speculator.model_cards.provenance_file import trusted_provenance, write_provenance
from modeling_speculator.published_drafters import find_published


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--speculator", required=True, metavar="FOLDER_OR_ID", help="of any published form")
    parser.add_argument("--revision", metavar="REVISION", help="of it on the Hub (default: the newest)")
    forms = ["mlp_speculator", "arctic", "modeling_speculator"]
    parser.add_argument("--to", required=True, choices=forms, help="the form to write")
    parser.add_argument("--output", type=output_folder, required=True, metavar="FOLDER", help="a new one")
    parser.add_argument(
        "--base_model_archs", nargs="+", metavar="CLASS", help="arctic: of base models (default: its own one's)"
    )
    parser.add_argument(
        "--base_model", metavar="FOLDER_OR_ID", help="modeling_speculator: the one it is for (default: what it says)"
    )
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty: take a new folder.")
    published = find_published(args.speculator, args.revision)
    if (published is not None) != (args.to == "modeling_speculator"):
        parser.error(
            "--to modeling_speculator is for what other programs publish (EAGLE, EAGLE-3, Medusa), and these for "
            "nothing else."
        )
    if published:
        speculator = published.beside(load_base_model(base_model_of(published, args.base_model))[0])
    else:
        speculator_config(args.speculator, args.revision)
        speculator = AutoModel.from_pretrained(args.speculator, revision=args.revision)
    config = speculator.config
    if args.to != "arctic":
        speculator.save_pretrained(args.output)
    else:
        save_arctic(speculator, args.output, args.base_model_archs or architectures_of_base(args.speculator, config))
    AutoModel.from_pretrained(args.output)  # what was written loads
    if provenance := trusted_provenance(args.speculator, args.revision):
        write_provenance(args.output, provenance)  # of the same numbers in other files
    base_model = config.base_model_name_or_path or "BASE_MODEL"
    try_it = command_of("generate.py", base_model=base_model, speculator=args.output, prompt="Once upon a time")
    say_end(*sorted(args.output.iterdir()), then={"try it": try_it})


def base_model_of(published, name: str | None) -> str:
    """Beside which what another program has published is read."""
    if name is None and published.base_model_name is None:
        raise ValueError(f"{published.name} does not say which base model it is for: give --base_model.")
    if name is None:
        check_is_hub_id(published.base_model_name, published.name)
    return name or published.base_model_name


def architectures_of_base(speculator: str, config) -> list[str]:
    """Of the base model that a speculator was trained for, as its config names it."""
    known, name = getattr(config, "base_model_archs", None), config.base_model_name_or_path
    if known:
        return known
    if name is None:
        raise ValueError("The speculator does not say which base model it is for: give --base_model_archs.")
    if not Path(speculator).is_dir():
        check_is_hub_id(name, speculator)
    return base_model_config(name, config.base_model_revision).architectures


if __name__ == "__main__":
    run(main, "What was written of --output is not whole: delete it.")
