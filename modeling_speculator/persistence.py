"""A speculator's checkpoint: read whole or not at all, and sent to the Hub with its card and code."""

import importlib
from pathlib import Path

from .formats import KEY_MAPPING


class WholeCheckpoints:
    """What `PreTrainedModel` does with checkpoints, as speculators need it; to be derived from before that.

    Attributes:
        loaded_revision: of a repository on the Hub.
    """

    loaded_revision: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """`PreTrainedModel.from_pretrained` that never half-loads.

        Raises:
            ValueError: if the checkpoint lacks a weight, has one too many, or one of another shape, or if its
                config ties weights that differ.
        """
        kwargs["ignore_mismatched_sizes"] = True  # so that they are named below
        kwargs["key_mapping"] = KEY_MAPPING | (kwargs.get("key_mapping") or {})
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        problems = [f"{kind}: {sorted(map(str, info[kind]))}" for kind in info if info[kind]]
        tied = model.speculator.tied_weights(model.config.n_predict) if model.config.tie_weights else {}
        differ = sorted({f"speculator.{key}" for key in tied} - model.all_tied_weights_keys.keys())
        if differ:
            problems.append(f"weights that `tie_weights` ties, yet differ: {differ}")
        if problems:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} don't fit its config.json "
                f"({'; '.join(problems)}). Check `n_predict`, `emb_dim`, `inner_dim`, `vocab_size` and `tie_weights` "
                "there, and that the download is complete."
            )
        model.loaded_revision = kwargs.get("revision")
        model.speculator.freeze_unread()
        return (model, info) if output_loading_info else model

    def push_to_hub(
        self,
        repo_id: str,
        version: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        **options,
    ):
        """Sends the speculator to the Hub with its card and code, as recipes/push_to_hub.py does.

        Args:
            version: as "1.0.0", which becomes the tag "v1.0.0"; None: no tag.
            revision: a branch; by default main.
            options: of `modeling_speculator.model_cards.publish`, which says what is returned and raised.
        """
        # By name: the code that a repository on the Hub carries is this, without that package.
        publishing = importlib.import_module("modeling_speculator.model_cards.publishing")
        options |= {"branch": revision or "main", "message": commit_message}
        return publishing.publish_model(self, repo_id, version, **options)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """`PreTrainedModel.save_pretrained`; where it pushes, the other arguments are those of `push_to_hub` here.

        Raises:
            ValueError: for other weights than the model's, which are not what would be pushed.
        """
        own_names = {"save_original_format": False}  # else those of another form that it was read from
        if not push_to_hub:
            return super().save_pretrained(save_directory, is_main_process, state_dict, **own_names | kwargs)
        if state_dict is not None:
            raise ValueError("Load `state_dict` into the speculator, then push it.")
        super().save_pretrained(save_directory, is_main_process, **own_names)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        return self.push_to_hub(repo_id, **kwargs) if is_main_process else None
