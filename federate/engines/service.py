"""What a site does for a server, and what it refuses."""

from __future__ import annotations

from typing import Any

from fedcmp.federate.client.site import Site
from fedcmp.federate.compatible import refuse, refuse_over_sites
from fedcmp.federate.engines.base import SiloCard, terms
from fedcmp.federate.engines.wire import job_of, result_as_dict
from fedcmp.federate.preference import run as alignment
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.judges import Judges
from fedcmp.federate.schedule import schedule_of
from fedcmp.federate.secure.signing import Signing
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.cache import differences, open_cache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.ranks import Ranks


class Service:
    """One silo with its cache and the frozen LLM; answers the server's requests.

    Args:
        experiment: What the site has agreed to.
        silo: Its name, one of `federate.silos`.
        signing: How the sites of secure sums know each other.
        ranks: Other processes of this site, which train with this one.

    Raises:
        UserError: The silo is not of the experiment, its cache or the LLM cannot be used, or the
            experiment cannot run over sites.
    """

    def __init__(
        self,
        experiment: Experiment,
        silo: str,
        signing: Signing | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        strategy = STRATEGIES.build(experiment.federate.strategy, "federate.strategy")
        refuse_over_sites(experiment, strategy)
        if silo not in experiment.federate.silos:
            raise UserError(
                f"--silo {silo}: not in federate.silos; there are {', '.join(experiment.federate.silos)}"
            )
        cache = open_cache(experiment, silo)
        self.silo = silo
        self._site: Site | Judges
        if experiment.align is None:
            schedule = schedule_of(experiment, strategy)
            refuse(experiment, strategy, schedule)
            self._site = Site(experiment, schedule, {silo: cache}, signing=signing, ranks=ranks)
        else:
            alignment.refuse(experiment)
            self._site = Judges(experiment, {silo: cache}, Ground(experiment))
        self._card = SiloCard.of(cache, experiment, self._site.counts[silo])
        self._terms = terms(experiment, self._card)

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request.

        Raises:
            UserError: It is not what the site has agreed to, or training failed.
            ValueError: A step of a secure round would reveal too much.
        """
        if request["kind"] == "hello":
            card = self._card.plain()
            greeting = {"silo": self.silo, "card": card, "terms": self._terms, "d_llm": self._site.d_llm}
            # Sites without one greet as those of before there were any.
            return greeting | ({"adapter": self._site.adapter} if self._site.adapter else {})
        self._agree(request["silo"], request["terms"])
        if isinstance(self._site, Judges):
            return {"answer": self._site(self.silo, request["step"])}
        if request["kind"] == "secure":
            return {"answer": self._site.secure(self.silo, request["step"])}
        (result,) = self._site([job_of(request["job"])])
        return {"result": result_as_dict(result)}

    def _agree(self, silo: str, asked: dict[str, Any]) -> None:
        if silo != self.silo:
            raise UserError(f"site '{self.silo}' refuses a task for silo '{silo}'")
        found = differences(self._terms, asked)
        if found:
            raise UserError(
                f"site '{self.silo}' refuses a task it has not agreed to ({'; '.join(found)}); give server "
                "and site the same experiment, LLM and encoder"
            )
