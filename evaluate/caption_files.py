"""Files of images with their captions: COCO's annotations, or Karpathy's splits of COCO and Flickr30k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluate.benchmarks.base import field, read_json_file, string
from pipeline.errors import UserError


def captioned_images(path: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every image that has captions, as `{"id", "image", "captions"}` with its place.

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
        raise UserError(f"{path}: 'images' is no list; is this the official file?")
    if "annotations" not in content:
        for number, entry in enumerate(images):
            where = f"{path}: image {number}"
            if field(entry, "split", where) == split:
                captions = [string(each, "raw", where) for each in field(entry, "sentences", where)]
                name = string(entry, "filename", where)
                image = "/".join(filter(None, [entry.get("filepath"), name]))
                identity = entry.get("cocoid", entry.get("imgid", name))
                yield where, {"id": identity, "image": image, "captions": captions}
        return
    references = defaultdict(list)
    for number, entry in enumerate(content["annotations"]):
        where = f"{path}: annotation {number}"
        references[field(entry, "image_id", where)].append(string(entry, "caption", where))
    for number, entry in enumerate(images):
        where = f"{path}: image {number}"
        if about := references.get(field(entry, "id", where)):
            yield where, {"id": entry["id"], "image": string(entry, "file_name", where), "captions": about}
