"""How much each reward model counts for a prompt, one file a way, and the words in which one is written."""

from fedcmp.federate.preference.routers.base import ROUTERS, Panel, Router

__all__ = ["ROUTERS", "Panel", "Router"]
