"""Frozen vision encoders, one file a library, and the words in which one is written."""

from fedcmp.extract.encoders.base import ENCODERS, Encoder, LoadedEncoder
from fedcmp.extract.pictures import Reading
from fedcmp.pipeline.errors import UserError

__all__ = ["ENCODERS", "Encoder", "LoadedEncoder", "Reading", "UserError"]
