"""Files of images with their captions: COCO's annotations, or Karpathy's splits of COCO and Flickr30k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmp.evaluate.official.files import Problem, attempt, field, read_json_file, string
from fedcmp.pipeline.errors import UserError


@dataclass(frozen=True)
class Captioned:
    """An image's id, its file's name, its captions, and its entry in the file."""

    id: str
    image: str
    captions: list[str]
    fields: dict[str, Any]


def captioned_images(path: Path, split: str) -> Iterator[tuple[str, Captioned | Problem]]:
    """Every image that has captions with its place; an entry out of form comes as a `Problem`.

    Args:
        path: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`, or
            `{"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}`.
        split: Which images of the second form.

    Raises:
        UserError: The file is in neither form.
    """
    content, place = read_json_file(path, "captions"), str(path)
    images = field(content, "images", place)
    if not isinstance(images, list):
        raise UserError(f"{path}: 'images' is not a list; is this the official file?")
    if "annotations" not in content:
        for number, entry in enumerate(images):
            if not isinstance(entry, dict) or entry.get("split") == split:
                where = f"{path}: image {number}"
                yield where, attempt(_karpathy, entry, where)
        return
    captions: dict[str, list[str]] = defaultdict(list)
    for number, entry in enumerate(field(content, "annotations", place)):
        where = f"{path}: annotation {number}"
        about = attempt(_annotation, entry, where)
        if isinstance(about, Problem):
            yield where, about
        else:
            captions[about[0]].append(about[1])
    for number, entry in enumerate(images):
        where = f"{path}: image {number}"
        image = attempt(_image, entry, where)
        if isinstance(image, Problem):
            yield where, image
        elif image[0] in captions:
            yield where, Captioned(*image, captions[image[0]], entry)


def _karpathy(entry: Any, where: str) -> Captioned:
    name = string(entry, "filename", where)
    image = "/".join(filter(None, [entry.get("filepath"), name]))
    captions = [string(each, "raw", where) for each in field(entry, "sentences", where)]
    if not captions:
        raise UserError(f"{where}: it has no caption")
    return Captioned(str(entry.get("cocoid", entry.get("imgid", name))), image, captions, entry)


def _annotation(entry: Any, where: str) -> tuple[str, str]:
    return str(field(entry, "image_id", where)), string(entry, "caption", where)


def _image(entry: Any, where: str) -> tuple[str, str]:
    return str(field(entry, "id", where)), string(entry, "file_name", where)
