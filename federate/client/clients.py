"""The clients whose silos are on a machine, and their frozen LLM: what every process that trains them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from fedcmp.federate.client.memo import Memo
from fedcmp.federate.client.share import Share, Whole
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.client.trainer import Trainer
from fedcmp.federate.privacy.steps import NoisySteps
from fedcmp.federate.privacy.units import UnitStream, unit_of
from fedcmp.federate.schedule import Schedule
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.identity import language_options
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import pick_device
from fedcmp.pipeline.models.language import FrozenLanguageModel, load_language
from fedcmp.pipeline.models.vision_language import VisionLanguage

# Texts that are left out, with the reason, by silo and index; of the LLM and the tokens of an image.
LeftOut = Callable[[FrozenLanguageModel, int], Mapping[str, dict[int, str]]]


class Clients:
    """Loads the LLM and makes every client's stream.

    Args:
        experiment: The experiment.
        schedule: Who takes part when.
        caches: Feature caches by silo; the clients are those whose silos are all here.
        left_out: Finds the texts that cannot be trained on.

    Attributes:
        device: Where they train.
        language: The LLM; in main memory where it is to be sharded.
        d_llm: Width of the LLM's embeddings.
        adapter: Shapes of the adapter's matrices by name.
        streams: Every client's data.
        strategy: Says what clients do.
        projector: Of the right architecture, with arbitrary weights.

    Raises:
        UserError: The LLM cannot be loaded, or a silo has too few texts.
    """

    def __init__(
        self,
        experiment: Experiment,
        schedule: Schedule,
        caches: Mapping[str, FeatureCache],
        left_out: LeftOut,
    ) -> None:
        self._options = options = experiment.federate
        self.strategy = STRATEGIES.build(options.strategy, "federate.strategy")
        self.device = pick_device(experiment.device)
        placed = language_options(experiment) | ({"device": "cpu"} if options.shard else {})
        self.language = language = load_language(experiment.language.path, **placed)
        language.checkpointing, language.compiled = options.checkpointing, options.compile
        first = next(iter(caches.values()))
        self.projector = projectors.build(options.projector, d_vision=first.d_vision, d_llm=language.d_llm)
        turns, poison = schedule.turns(), options.poison or {}
        visual_tokens = self.projector.tokens(first.patches)
        without = left_out(language, visual_tokens)
        self.d_llm = language.d_llm
        self.adapter = {name: tuple(matrix.shape) for name, matrix in language.adapter.items()}
        self._model = VisionLanguage(self.projector.to(self.device), language)
        unit = unit_of(options.clipped)
        stream = Stream if unit is None else partial(UnitStream, unit=unit)
        self.streams = {
            client: stream(
                {silo: caches[silo] for silo in silos},
                language,
                template=experiment.language.template,
                max_length=language.at_most(experiment.language.max_length),
                batch_size=options.batch_size,
                turns=turns[client],
                passes=options.passes,
                seed=experiment.seed,
                visual_tokens=visual_tokens,
                without=without,
                mismatched=client in poison and poison[client].kind == "captions",
            )
            for client, silos in schedule.groups.items()
            if caches.keys() >= set(silos)
        }

    def trainer(
        self,
        *,
        memo: Memo | None = None,
        advance: Callable[[int], None] = lambda steps: None,
        noisy: NoisySteps | None = None,
        share: Share | None = None,
    ) -> Trainer:
        """Trains them; arguments as in `Trainer`."""
        options = self._options
        return Trainer(
            self.streams,
            self._model,
            options.optimizer,
            batch_size=options.batch_size,
            together=options.together,
            micro_batch=options.micro_batch or options.batch_size,
            micro_tokens=options.micro_tokens,
            memo=memo,
            advance=advance,
            noisy=noisy,
            share=share or Whole(),
            role=self.strategy.role,
            adapter_rate=None if options.adapter is None else options.adapter.learning_rate,
        )
