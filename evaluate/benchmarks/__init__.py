"""Benchmarks, one file each, and the words in which one is written."""

from typing import TYPE_CHECKING, Any

from fedcmp.evaluate.benchmarks.base import (
    BENCHMARKS,
    LETTER,
    SHORT_ANSWER,
    YES_NO,
    Answer,
    Answers,
    Asks,
    Benchmark,
    Choice,
    Item,
    Mode,
    annotators,
    averaged,
    averaged_by,
    choices_prompt,
    collect,
    undecided,
)
from fedcmp.evaluate.metric import Metric, mean, ratio
from fedcmp.evaluate.official.files import (
    Problem,
    attempt,
    entries,
    field,
    file_name,
    json_lines,
    read_json_file,
    read_text_file,
    string,
    strings,
    to_json,
)
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import CAPTION_PROMPT, question

if TYPE_CHECKING:
    from fedcmp.pipeline.cache import FeatureCache

__all__ = [
    "BENCHMARKS",
    "CAPTION_PROMPT",
    "LETTER",
    "SHORT_ANSWER",
    "YES_NO",
    "Answer",
    "Answers",
    "Asks",
    "Benchmark",
    "Choice",
    "FeatureCache",
    "Item",
    "Metric",
    "Mode",
    "Problem",
    "UserError",
    "annotators",
    "attempt",
    "averaged",
    "averaged_by",
    "choices_prompt",
    "collect",
    "entries",
    "field",
    "file_name",
    "json_lines",
    "mean",
    "question",
    "ratio",
    "read_json_file",
    "read_text_file",
    "string",
    "strings",
    "to_json",
    "undecided",
]


def __getattr__(name: str) -> Any:
    """The cache's class, for annotations; it takes longer to load than all benchmarks together."""
    if name == "FeatureCache":
        from fedcmp.pipeline.cache import FeatureCache

        return FeatureCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
