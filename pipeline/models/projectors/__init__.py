"""Projectors, one file an architecture, and the words in which one is written."""

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.projectors.base import PROJECTORS, Architecture, Projector, side_of

__all__ = ["PROJECTORS", "Architecture", "Projector", "UserError", "side_of"]
