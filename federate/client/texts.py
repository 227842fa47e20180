"""Texts that cannot be trained on, found before the first round: counted, listed and left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress, say
from fedcmp.pipeline.files import read_json, write_atomic, write_json
from fedcmp.pipeline.hashes import fingerprint, sha256_file
from fedcmp.pipeline.identity import language_identity
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedcmp.pipeline.models.language import FrozenLanguageModel

_AT_ONCE = 2048
_SHOWN = 3
FOLDER = "left_out"


class Counts(NamedTuple):
    """Training texts of a silo: those that are trained on, and those that cannot be."""

    samples: int
    left_out: int


def unusable(
    cache: FeatureCache,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    visual_tokens: int,
    advance: Callable[[int], None] = lambda texts: None,
) -> dict[int, str]:
    """Why training texts of a silo cannot be trained on, by their index.

    Args:
        cache: The silo's cache.
        tokenizer: The LLM's.
        template: How texts become prompts.
        max_length: Tokens a sample may have.
        visual_tokens: Tokens an image takes in a prompt.
        advance: Called with the number of texts looked at.

    Raises:
        UserError: The tokenizer has no such template.
    """
    found: dict[int, str] = {}
    indices = cache.usable_texts("train").tolist()
    for start in range(0, len(indices), _AT_ONCE):
        some = indices[start : start + _AT_ONCE]
        reasons = prompts.problems(
            [cache.text(index) for index in some],
            template,
            tokenizer,
            patches=visual_tokens,
            max_length=max_length,
        )
        found |= {index: reason for index, reason in zip(some, reasons, strict=True) if reason is not None}
        advance(len(some))
    return found


def check_texts(
    experiment: Experiment,
    caches: Mapping[str, FeatureCache],
    llm: FrozenLanguageModel,
    visual_tokens: int,
) -> dict[str, dict[int, str]]:
    """`unusable` texts of silos, said and written into the run's folder.

    What was found is remembered beside the runs, so that other runs on the same texts need not look again.
    """
    language = experiment.language
    context = {
        "language": language_identity(experiment)["files"],
        "prompt": [language.template, language.max_length, visual_tokens],
        "made_by": [provenance("cpu")["packages"], sha256_file(Path(prompts.__file__))],
    }
    found = {}
    for silo, cache in caches.items():
        path = experiment.build / "texts" / f"{fingerprint([context, cache.content])}.json"
        known = read_json(path)
        if known is None:
            with progress(f"texts of {silo}", len(cache.usable_texts("train")), "texts") as task:
                known = unusable(
                    cache,
                    llm.tokenizer,
                    template=language.template,
                    max_length=llm.at_most(language.max_length),
                    visual_tokens=visual_tokens,
                    advance=task.advance,
                )
            write_json(path, known)
        found[silo] = {int(index): str(reason) for index, reason in known.items()}
        _list(experiment.run_path / FOLDER / f"{silo}.jsonl", silo, cache, found[silo])
    return found


def _list(path: Path, silo: str, cache: FeatureCache, found: Mapping[int, str]) -> None:
    """Write which texts are left out, and say the first ones."""
    if not found:
        path.unlink(missing_ok=True)
        return
    rows = [
        {"silo": silo, "image": cache.ids[cache.text_image[index]], "text": index, "reason": reason}
        for index, reason in found.items()
    ]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    of_all = len(cache.usable_texts("train"))
    say(f"{silo}: {len(rows):,} of {of_all:,} training texts cannot be trained on and are left out")
    for row in rows[:_SHOWN]:
        say(f"  {row['image']}: {row['reason']}")
    if len(rows) > _SHOWN:
        say(f"  and {len(rows) - _SHOWN:,} more in {path}")
