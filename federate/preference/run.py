"""One alignment: a finished run and preferences in, an ordinary run folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedcmp.federate.engines.base import Engine, SiloCard
from fedcmp.federate.finish import finish, found
from fedcmp.federate.preference.averaging import average
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.judges import Judges
from fedcmp.federate.preference.jury import Jury
from fedcmp.federate.preference.progress import Progress
from fedcmp.federate.preference.record import summary, write_sampled
from fedcmp.federate.preference.rewards import REWARDS
from fedcmp.federate.preference.training import train
from fedcmp.federate.schedule import Schedule, schedule_of
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline import history
from fedcmp.pipeline.cache import open_cache, same_key
from fedcmp.pipeline.config import Experiment, Federate
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.run_folder import PROJECTOR, Run

_WITHOUT_EFFECT = (
    *("passes", "clients_per_round", "together", "micro_tokens", "all_reduce", "shard"),
    *("privacy", "communication", "poison"),
)
_STRATEGIES = {"grpo": "mor", "dpo": "fed_dpo", "sft": "fed_sft"}


def align(experiment: Experiment, engine: Callable[[Experiment, Schedule], Engine] | None = None) -> Run:
    """Align a projector, go on with it, or find it done.

    Args:
        experiment: The experiment, with `align`.
        engine: Makes what reaches the silos; they are all in this process by default.

    Returns:
        The finished run.

    Raises:
        UserError: Something that the experiment names is missing or does not fit.
    """
    refuse(experiment)
    assert experiment.align is not None
    out, silos = experiment.run_path, experiment.federate.silos
    with locked(out / ".lock", str(out)):
        ground = Ground(experiment)
        if engine is None:
            caches = {name: open_cache(experiment, name) for name in silos}
            same_key(caches)
            judges = Judges(experiment, caches, ground)
            cards = {name: SiloCard.of(caches[name], experiment, judges.counts[name]) for name in silos}
            jury = Jury(
                ground, silos, lambda steps: {name: judges(name, step) for name, step in steps.items()}
            )
        else:
            strategy = STRATEGIES.build(experiment.federate.strategy, "federate.strategy")
            sites = engine(experiment, schedule_of(experiment, strategy))
            cards = sites.cards()
            jury = Jury(ground, silos, lambda steps: sites.exchange(steps, "align"))
        wanted = run_identity(experiment, cards[silos[0]].language) | {
            "caches": {name: cards[name].content for name in silos},
            "prompts": ground.public.contents,
        }
        if wanted["federate"]["initial"] != ground.initial:
            initial = experiment.federate.initial
            raise UserError(f"federate.initial = {initial}: changed just now; run this again")
        files = (
            {silo: own for silo in silos if (own := reward_files(experiment, silo))} if engine is None else {}
        )
        if files:
            wanted["reward_files"] = files
        made = found(experiment, wanted)
        if made is not None:
            return made
        made = _aligned(experiment, ground, jury, cards, wanted)
    say(f"Projector, history and sampled answers in {out}")
    return made


def reward_files(experiment: Experiment, silo: str) -> dict[str, str]:
    """Files that decide a silo's rewards besides its options, as they are here."""
    assert experiment.align is not None
    return REWARDS.build(experiment.align.reward_of(silo), f"align.rewards.{silo}").files()


def refuse(experiment: Experiment) -> None:
    """Refuse what is no alignment, or would not be what its options say.

    Raises:
        UserError: Naming the option.
    """
    align, options = experiment.align, experiment.federate
    if align is None:
        raise UserError("this experiment has no [align]; add it (docs/mor.md), or use 'fedcmp federate'")
    if options.initial is None:
        raise UserError("federate.initial: names the run to start from, which stays the reference; set it")
    strangers = sorted(set(align.rewards) - set(options.silos))
    if strangers:
        raise UserError(f"align.rewards names {', '.join(strangers)}, none of federate.silos; remove it")
    judging = sorted(set(align.prompts) & set(options.silos))
    if judging:
        raise UserError(
            f"align.prompts: {', '.join(judging)} judges, too; give prompts that everybody may see"
        )
    for name in _WITHOUT_EFFECT:
        if getattr(options, name) != Federate.model_fields[name].get_default():
            raise UserError(f"federate.{name}: does nothing with [align]; remove it")
    if options.strategy.name != "fedavg" or options.optimizer.carry:
        what = "optimizer.carry" if options.optimizer.carry else f"strategy.name = '{options.strategy.name}'"
        raise UserError(f"federate.{what}: does nothing with [align]; remove it")
    if align.method != "grpo" and not align.average:
        raise UserError(f"align.average = 0: '{align.method}' is averaged over rounds; give their number")
    if align.average and align.rewards and align.method == "grpo":
        raise UserError("align.average: reward models that are averaged are all alike; remove align.rewards")


def _aligned(
    experiment: Experiment,
    ground: Ground,
    jury: Jury,
    cards: Mapping[str, SiloCard],
    wanted: dict[str, Any],
) -> Run:
    align, out = experiment.align, experiment.run_path
    assert align is not None
    path, print_of_run = out / "checkpoint.pt", fingerprint(wanted)
    done = Progress.load(path, print_of_run)
    if done is not None:
        say(f"{out}: continuing after step {done.step}")
    done = done or Progress(dict(ground.reference), dict(ground.reference))
    history.truncate(out / history.HISTORY, done.step)
    if align.method == "grpo":
        train(experiment, ground, jury, done, lambda: done.save(path, print_of_run))
        summary(experiment.run, jury, history.read(out / history.HISTORY))
    else:
        average(experiment, jury, done, lambda: done.save(path, print_of_run))
    write_sampled(experiment, ground, done.state)
    facts = {
        "rewards": jury.contents,
        "accuracies": jury.accuracies,
        "agreement": done.agreement,
        "kinds": [ground.public.kinds[kind] for kind in done.kinds],
        "stopped": done.stopped,
    }
    made = finish(
        experiment,
        _STRATEGIES[align.method] if align.method != "grpo" or align.steps else "none",
        wanted,
        {PROJECTOR: done.state},
        ground.model.projector.architecture,
        next(iter(cards.values())),
        {name: {"samples": card.samples, "left_out": card.left_out} for name, card in cards.items()},
        {"align": facts},
    )
    path.unlink(missing_ok=True)
    return made
