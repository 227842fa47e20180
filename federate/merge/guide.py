"""What layers contribute to alignment, computed for methods that weight layers by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fedcmp.federate.arithmetic.updates import Measure
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.client.texts import unusable
from fedcmp.federate.merge.inputs import Inputs
from fedcmp.pipeline.cache import FeatureCache, same_key
from fedcmp.pipeline.console import progress, say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import device_type, pick_device, pick_dtype
from fedcmp.pipeline.models.language import FrozenLanguageModel, load_language
from fedcmp.pipeline.models.projectors.base import Projector
from fedcmp.pipeline.models.saved_model import LANGUAGE_FILES, model_hashes
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.plugins import Plugin

_BATCH = 32


_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Guide:
    """What alignments are computed from.

    `features` are one cache a projector in order, or one for all; about `texts` training texts are
    taken from each.
    """

    features: tuple[Path, ...]
    language: Path
    template: str
    texts: int


def aligned(inputs: Inputs, guide: Guide, measure: Measure, plugins: tuple[Plugin, ...] = ()) -> Inputs:
    """The inputs with the alignments of their updates."""
    from fedcmp.federate.client.alignment import alignment_contributions

    sources = inputs.sources
    if len(guide.features) not in (1, len(sources)):
        raise UserError(
            f"--features: number of caches is {len(guide.features)}, of projectors {len(sources)}; "
            "give one each in the same order, or one for all"
        )
    caches = {str(path): received(path) for path in guide.features}
    same_key(caches)
    files = model_hashes(guide.language, LANGUAGE_FILES)
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    language = load_language(guide.language, content=fingerprint(files), dtype=dtype, device=device)
    projector, _ = projectors.load_projector(sources[0].path, plugins)
    first = next(iter(caches.values()))
    _refuse_another_width(sources[0].path, projector, first, language, guide.language)
    model = VisionLanguage(projector.to(device), language)
    visual_tokens = projector.tokens(first.patches)
    without = {
        name: unusable(
            cache,
            language.tokenizer,
            template=guide.template,
            max_length=language.at_most(_MAX_LENGTH),
            visual_tokens=visual_tokens,
        )
        for name, cache in caches.items()
    }
    for name, reasons in without.items():
        if reasons:
            say(f"{name}: {len(reasons)} texts are left out; the first: {next(iter(reasons.values()))}")
    aligned = []
    with progress("alignment", len(sources), "projectors") as task:
        for number, update in enumerate(inputs.updates):
            name = str(guide.features[number % len(guide.features)])
            stream = Stream(
                {name: caches[name]},
                language,
                template=guide.template,
                max_length=language.at_most(_MAX_LENGTH),
                batch_size=_BATCH,
                turns=1,
                seed=0,
                visual_tokens=visual_tokens,
                without={name: without[name]},
            )
            some = islice(stream.batches(0), -(-guide.texts // _BATCH))
            contributions = alignment_contributions(model, inputs.base, update.state, some, measure)
            aligned.append(replace(update, alignment=contributions))
            task.advance()
    say(f"Alignment: {guide.texts} training texts at most from each of {', '.join(caches)}")
    guided = {
        "caches": {path: cache.content for path, cache in caches.items()},
        "language": {
            "path": str(guide.language),
            "files": files,
            "dtype": dtype,
            "device": device_type(device),
        },
        "template": guide.template,
        "texts": guide.texts,
        "measure": measure,
        "contributions": {update.client: update.alignment for update in aligned},
    }
    return replace(inputs, updates=aligned, guided=guided)


def _refuse_another_width(
    source: Path, projector: Projector, cache: FeatureCache, language: FrozenLanguageModel, llm: Path
) -> None:
    for place, width, expected in (
        (cache.path, cache.d_vision, projector.d_vision),
        (llm, language.d_llm, projector.d_llm),
    ):
        if width != expected:
            raise UserError(
                f"{place}: has width {width}, but {source} maps {projector.d_vision} to {projector.d_llm}; "
                "give the features and the LLM that the projectors were trained with"
            )
