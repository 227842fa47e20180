"""Where a silo's images and texts come from, one file a form, and the words in which one is written."""

from fedcmp.extract.sources.base import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    SOURCES,
    Pair,
    Skipped,
    Source,
    by_image,
    hash_file,
    image_name,
    image_names,
    json_lines,
    printable,
    read_lines,
    stat_files,
    stat_images,
    text_of,
    texts_of,
)
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import Record, Text, caption, from_llava
from fedcmp.pipeline.remote import Location, Remote

__all__ = [
    "IMAGE_SUFFIXES",
    "OTHER_IMAGE_SUFFIXES",
    "SOURCES",
    "Location",
    "Pair",
    "Record",
    "Remote",
    "Skipped",
    "Source",
    "Text",
    "UserError",
    "by_image",
    "caption",
    "from_llava",
    "hash_file",
    "image_name",
    "image_names",
    "json_lines",
    "printable",
    "read_lines",
    "stat_files",
    "stat_images",
    "text_of",
    "texts_of",
]
