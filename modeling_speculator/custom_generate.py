"""A speculator's repository on the Hub carries this as `custom_generate/generate.py`: speculation without a package.

model.generate(**inputs, assistant_model=speculator, custom_generate="org/name", trust_remote_code=True)
"""

import importlib


def generate(model, assistant_model=None, revision=None, token=None, cache_dir=None, **kwargs):
    """`model.generate(assistant_model=...)`, with the code that the speculator was loaded with.

    Args:
        assistant_model: a speculator, of `AutoModel.from_pretrained("org/name", trust_remote_code=True)`.
        revision, token, cache_dir: with which this file was found.
        kwargs: of `generate`.
    """
    if not hasattr(assistant_model, "generate_candidates"):
        raise ValueError(
            "Give a speculator, loaded with `AutoModel.from_pretrained(..., trust_remote_code=True)`, as "
            f"`assistant_model`, not {type(assistant_model).__name__}."
        )
    package = type(assistant_model).__module__.rpartition(".")[0]
    with importlib.import_module(f"{package}.generation").generation_hook():
        return model.generate(assistant_model=assistant_model, **kwargs)
