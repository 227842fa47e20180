"""What the server and every site of an alignment hold alike: the LLM, the reference, public prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedcmp.federate.preference.candidates import Asking, Candidates
from fedcmp.federate.preference.mixture import context
from fedcmp.federate.preference.public import Public
from fedcmp.pipeline.cache import open_cache, same_key
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import language_options, written_by
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import pick_device
from fedcmp.pipeline.models.language import load_language
from fedcmp.pipeline.models.lora import draw
from fedcmp.pipeline.models.pretrained import start_from
from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage


class Ground:
    """Loads them.

    Args:
        experiment: The experiment; `federate.initial` is the reference.

    Attributes:
        language: The frozen LLM.
        model: It, behind the reference projector.
        reference: The reference's state, a new adapter included where there is one.
        initial: Content hash of what the reference projector is made of.
        content: Fingerprint of that, of the prompts and of how they are written.
        asking: How questions become token ids.
        public: The prompts.
        d_vision: Width of a feature.

    Raises:
        UserError: The reference does not fit, or a silo of prompts cannot be used.
    """

    def __init__(self, experiment: Experiment) -> None:
        options, align = experiment.federate, experiment.align
        assert align is not None
        assert options.initial is not None
        caches = {kind: open_cache(experiment, kind) for kind in align.prompts}
        same_key(caches)
        first = next(iter(caches.values()))
        self.d_vision, device = first.d_vision, pick_device(experiment.device)
        self.language = load_language(experiment.language.path, **language_options(experiment))
        projector = projectors.build(options.projector, d_vision=first.d_vision, d_llm=self.language.d_llm)
        self.language.checkpointing, self.language.compiled = options.checkpointing, options.compile
        self.initial = start_from(options.initial, projector, options.projector.plugins)
        self.model = VisionLanguage(projector.to(device), self.language)
        shapes = {name: tuple(matrix.shape) for name, matrix in self.language.adapter.items()}
        self._adapter = draw(shapes, torch.Generator().manual_seed(experiment.seed))
        self.reference = projectors.state_of(projector) | self._adapter
        self.model.load(self.reference)
        self.asking = Asking.of(experiment, self.language, projector.tokens(first.patches))
        self.public = Public(caches, self.asking, align.max_new_tokens)
        self.content = fingerprint([self.initial, self.public.contents, written_by(experiment)])

    @property
    def width(self) -> int:
        """Features of a prompt that a router sees."""
        return 2 * self.language.d_llm + 1

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The LLM with the adapter of the reference, whatever is being trained in its place."""
        kept = {name: matrix.detach().clone() for name, matrix in self.language.adapter.items()}
        try:
            self._wear(self._adapter)
            yield
        finally:
            self._wear(kept)

    @torch.no_grad()
    def _wear(self, adapter: dict[str, Tensor]) -> None:
        for name, matrix in self.language.adapter.items():
            matrix.copy_(adapter[name])

    @torch.no_grad()
    def context(self, candidates: Candidates) -> Tensor:
        """What a router sees of each answer's prompt: `(answers, width)` float32 on the CPU."""
        pictures = self.model.visual(candidates.features).float().mean(1)
        seen = pictures[candidates.owners.to(pictures.device)]
        asked = []
        for prompt in candidates.prompts:
            words = [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
            ids = torch.tensor(words, dtype=torch.int64, device=self.language.device)
            asked.append(self.language.words(ids).float().mean(0) if words else seen.new_zeros(seen.shape[1]))
        return context(seen, torch.stack(asked)).cpu()
