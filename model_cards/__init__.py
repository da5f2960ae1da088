"""Speculators on the Hub: versions, and cards of what was measured."""

from .model_card import render_card
from .publishing import Publication, list_versions, publish, publish_model


__all__ = ["Publication", "list_versions", "publish", "publish_model", "render_card"]
