"""`push_to_hub` of a training: what recipes/push_to_hub.py sends, while it trains and at its end."""

import logging

from huggingface_hub import HfApi
from peft import PeftModel
from transformers.trainer_utils import HubStrategy

from ..model_cards.publishing import check_base_is_there, check_repository, list_versions, publish, tag_of
from ..model_cards.repository import check_base_model
from ..transformers_api import save_model_only
from .run_record import latest_checkpoint
from .safe_trainer import SafeTrainer


logger = logging.getLogger(__name__)


class PublishingTrainer(SafeTrainer):
    """A trainer whose pushes are speculators with their card and code, in one commit each, tagged at the end."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Finds out before the training what would stop a push after it, as far as that can be known."""
        if self.args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE) or self.args.hub_always_push:
            raise ValueError(
                "Speculators are pushed at the `end`, or at `every_save`, while the training waits; optimizer states "
                "are not. Set `hub_strategy` to one of them, and drop `hub_always_push`."
            )
        if isinstance(self.model, PeftModel):
            raise ValueError("An adapter can't be pushed as a speculator. Drop `push_to_hub`, and merge it first.")
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if fsdp is not None and "FULL" not in str(fsdp.state_dict_type):
            raise ValueError("What is pushed are whole weights: set `fsdp_state_dict_type: FULL_STATE_DICT`.")
        tag = tag_of(self.args.hub_version) if self.args.hub_version is not None else None
        check_base_model(self.model.config.base_model_name_or_path)
        if private is not None:
            self.args.hub_private_repo = private  # before 5.24 transformers takes it from there only
        super().init_hf_repo(token)
        if not self.is_world_process_zero():
            return
        api = HfApi(token=token or self.args.hub_token)
        check_base_is_there(api, self.hub_model_id, self.model.config.to_dict())
        check_repository(api, self.hub_model_id, api.repo_info(self.hub_model_id), self.args.hub_private_repo)
        if tag in list_versions(self.hub_model_id, api.token) and latest_checkpoint(self.args.output_dir) is None:
            raise ValueError(f"{self.hub_model_id} has a version {tag} already. Set another `hub_version`.")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
    ) -> str | None:
        """Publishes the speculator, tagged with `hub_version` unless it is `save_model` that pushes.

        Args:
            blocking: of transformers; this always returns when all is there.
            license: as the Hub writes it, for the card.

        Returns:
            The commit, in the main process.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        save_model_only(self)
        if not self.is_world_process_zero():
            return None
        version = None if commit_message == "Model save" else self.args.hub_version
        options = {"token": token, "branch": revision, "private": private, "license": license}
        return self._publish(self.args.output_dir, version, commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As far as it goes: a training of hours does not end because the Hub can't be reached for a moment."""
        if self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            try:
                self._publish(checkpoint_folder, None, f"Training in progress, step {self.state.global_step}")
            except Exception as error:
                logger.warning("%s was not pushed (%s); the training goes on.", checkpoint_folder, error)

    def _publish(
        self, folder: str, version: str | None, message: str | None, token=None, branch=None, **options
    ) -> str:
        options |= {"branch": branch or self.args.hub_revision or "main", "token": token or self.args.hub_token}
        # What the config says, wherever the base model was loaded from.
        options["base_model"] = self.model.config.base_model_name_or_path
        return publish(folder, self.hub_model_id, version, message=message, **options).commit
