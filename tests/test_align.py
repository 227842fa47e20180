"""An alignment from caches to a projector: in one process, over sites, killed and rerun, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CAPTIONS, apart, write_llava
from safetensors.torch import load_file
from test_sites import FakeLink, over, sites_config  # noqa: F401

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.wire import Payload, pack, unpack
from fedcmp.federate.preference import training
from fedcmp.federate.preference.candidates import log_probs
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.jury import Jury
from fedcmp.federate.preference.policy import Policy, sample
from fedcmp.federate.preference.public import as_lists, as_tensors
from fedcmp.federate.preference.run import align
from fedcmp.federate.run import run as federate
from fedcmp.pipeline.cache import open_cache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.decoding import drawn, greedy
from fedcmp.pipeline.run_folder import Run

SILOS = ("clinic", "lab", "practice")
QUESTION = "Is there a dog?"


def preferring(folder: Path, number: int, first: int) -> Path:
    """Captions and questions with a chosen and a rejected answer, beside ordinary ones."""
    path = write_llava(folder, number, first)
    entries = json.loads(path.read_text())
    for seed, entry in enumerate(entries):
        del entry["conversations"]
        if seed % 2:
            entry["conversations"] = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
            entry |= (
                {"chosen": "yes", "rejected": "no"} if seed % 4 == 1 else {"chosen": "no", "rejected": "yes"}
            )
        else:
            entry |= {"chosen": CAPTIONS[seed % 4], "rejected": CAPTIONS[(seed + 1) % 4]}
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="session")
def align_config(sites_config: Path) -> Path:  # noqa: F811
    """Three silos that prefer, two kinds of public prompts, and a reference."""
    root = apart(sites_config, "align").parent
    silos = "".join(
        f'{silo} = {{ name = "llava_json", path = "{preferring(root / silo, 24, 1000 * place)}", '
        f'images = "{root / silo}" }}\n'
        for place, silo in enumerate(SILOS)
    )
    for kind, first in (("described", 5000), ("asked", 6000)):
        preferred = json.loads(preferring(root / kind, 8, first).read_text())
        path = write_llava(root / kind, 10, first + 100)
        ordinary = json.loads(path.read_text())
        if kind == "described":
            ordinary = [{"image": each["image"], "caption": "a cat"} for each in ordinary]
        path.write_text(json.dumps([*preferred, *ordinary]))
        silos += f'{kind} = {{ name = "llava_json", path = "{path}", images = "{root / kind}" }}\n'
    path = root / "align.toml"
    path.write_text(
        f"""
extends = "{sites_config}"
experiment = "align"
features = "{root}/features"
build = "{root}/build"

[extract.silos]
{silos}
[federate]
initial = "{root}/build/runs/align/reference"
batch_size = 8
micro_batch = 4

[align]
prompts = ["described", "asked"]
steps = 4
prompts_per_step = 2
num_generations = 2
steps_per_generation = 2
max_new_tokens = 5
learning_rate = 1e-2
calibration = 4
least = 0.0
hold_out = 4
reward = {{ name = "likelihood", epochs = 1 }}
router = {{ name = "domain", steps = 5 }}
"""
    )
    # The reference is trained on what a preference is not: ordinary texts of the other experiment.
    assert CliRunner().invoke(main, ["extract", str(path)]).exit_code == 0
    ordinary = load(
        sites_config, ["run=reference", "experiment=align", f"build={root}/build", "federate.rounds=1"]
    )
    federate(ordinary)
    return path


def done(align_config: Path, name: str, *overrides: str, command: str = "align") -> Result:
    words = [word for each in (f"run={name}", *overrides) for word in ("--set", each)]
    return CliRunner().invoke(main, [command, str(align_config), *words])


def run_of(align_config: Path, name: str) -> Run:
    run = Run.find(load(align_config).build / "runs/align" / name)
    assert run is not None
    return run


def weights_of(align_config: Path, name: str) -> bytes:
    return (run_of(align_config, name).path / "projector.safetensors").read_bytes()


@pytest.fixture(scope="session")
def aligned(align_config: Path) -> Path:
    result = done(align_config, "mor")
    assert result.exit_code == 0, result.output
    return align_config


@pytest.fixture(scope="session")
def ground(align_config: Path) -> Ground:
    return Ground(load(align_config))


def test_a_run_like_any_other_comes_out(aligned: Path) -> None:
    run = run_of(aligned, "mor")
    assert run.manifest["strategy"] == "mor"
    assert run.manifest["texts"]["clinic"] == {"samples": 18, "left_out": 0}
    assert set(run.manifest["align"]["accuracies"]) == set(SILOS)
    reference = load_file(run_of(aligned, "reference").path / "projector.safetensors")
    ours = load_file(run.path / "projector.safetensors")
    assert any(not torch.equal(ours[name], reference[name]) for name in ours)
    rows = run.history
    steps = [row for row in rows if row["client"] is None]
    assert [row["round"] for row in steps] == [0, 1, 2, 3]
    assert all({"reward", "kl", "clipped", "length"} <= row.keys() for row in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 0
    assert all(abs(row["reward"]) > 1e-3 for row in steps)
    for step in range(4):
        shares = [row["weight"] for row in rows if row["client"] and row["round"] == step]
        assert sum(shares) == pytest.approx(1)
    told = [json.loads(line) for line in (run.path / "sampled.jsonl").read_text().splitlines()]
    assert {each["kind"] for each in told} == {"described", "asked"}
    assert done(aligned, "mor").output.count("nothing to do") == 1


def test_it_is_judged_and_reported(aligned: Path) -> None:
    for command in ("evaluate", "report"):
        result = done(aligned, "mor", command=command)
        assert result.exit_code == 0, result.output
    other = done(aligned, "mor", "align.beta=0.3", command="evaluate")
    assert other.exit_code == 2
    assert "align.beta: 0.3 here, 0.5 there" in other.output


def test_federate_does_stage_two_of_an_alignment_too(aligned: Path) -> None:
    assert "nothing to do" in done(aligned, "mor", command="federate").output


def test_killed_and_rerun_ends_in_the_same_bytes(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = Policy.step

    def dying(*args: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "step", dying)
        assert done(aligned, "killed").exit_code != 0
    assert Run.find(load(aligned).build / "runs/align/killed") is None
    result = done(aligned, "killed")
    assert "continuing after step 2" in result.output
    assert weights_of(aligned, "killed") == weights_of(aligned, "mor")
    assert run_of(aligned, "killed").history == run_of(aligned, "mor").history


def test_sites_end_in_the_same_bytes_and_send_no_weights(aligned: Path) -> None:
    experiment = load(aligned, ["run=afar", "sites.join_timeout=5", "sites.round_timeout=60"])
    sent: list[Payload] = []

    class Listening(FakeLink):
        def send(self, node: int, kind: str, payload: Payload, seconds: float) -> str:
            sent.append(payload)
            if kind == "train":
                sent.append(pack(self.services[node].handle(unpack(payload))))
            return super().send(node, kind, payload, seconds)

    services = {node: Service(experiment, silo) for node, silo in enumerate(SILOS)}
    run = align(experiment, over(Listening(services)))
    assert (run.path / "projector.safetensors").read_bytes() == weights_of(aligned, "mor")
    assert len(sent) > 20
    files = list((run.path.parents[2] / "rewards").glob("*.safetensors"))
    assert len(files) >= 3
    secret = [
        tensor.numpy().tobytes()
        for file in files
        for tensor in load_file(file).values()
        if tensor.numel() > 8
    ]
    for message in sent:
        assert not any(part in message.tensors for part in secret)
        assert "projector" not in message.text.replace('"projector": {', "")


def test_a_missing_judge_stops_it_and_a_rerun_goes_on(aligned: Path) -> None:
    experiment = load(aligned, ["run=absent", "sites.join_timeout=5", "sites.round_timeout=2"])
    link = FakeLink({node: Service(experiment, silo) for node, silo in enumerate(SILOS)})
    link.on_train = lambda node: link.mute.update({1: 60.0}) if len(link.sent) > 29 else None
    with pytest.raises(UserError, match=r"no answer from lab.*run this again"):
        align(experiment, over(link))
    again = FakeLink({node: Service(experiment, silo) for node, silo in enumerate(SILOS)})
    align(experiment, over(again))
    assert weights_of(aligned, "absent") == weights_of(aligned, "mor")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": torch.zeros(3)}, "no float32 tensor of shape"),
        ({"rewards": torch.full((16,), float("nan"))}, "not finite"),
        ({"rewards": [0.0] * 16}, "no float32 tensor"),
        ({}, "no float32 tensor"),
    ],
)
def test_odd_rewards_name_their_site(ground: Ground, answer: dict[str, object], message: str) -> None:
    jury = Jury(ground, SILOS, lambda steps: {name: answer for name in steps})
    jury.contents = dict.fromkeys(SILOS, "0" * 64)
    places = ground.public.questions([0, 1], 0, 8, 0)
    with pytest.raises(UserError, match=f"site 'clinic' answered with rewards that .*{message}"):
        jury.scores(places, [[[5, 6], [7]]] * 8)


@pytest.mark.parametrize(
    "step",
    [
        {"step": "tune", "state": {}, "round": 0},
        {"step": "fit", "epochs": [0, 1], "start": {}},
        {"step": "fit", "epochs": [0, 9]},
        {"step": "score", "content": "0" * 64},
        {"step": "margins", "content": None},
        {"step": "give me your data"},
    ],
)
def test_a_site_does_what_was_agreed_to_alone(
    align_config: Path, ground: Ground, step: dict[str, object]
) -> None:
    service = Service(load(align_config, ["run=asked"]), "clinic")
    request = {"kind": "align", "silo": "clinic", "terms": service.handle({"kind": "hello"})["terms"]}
    with pytest.raises(ValueError, match=r"no step|not averaged|fit it again"):
        service.handle(request | {"step": step | {"ground": ground.content}})
    with pytest.raises(UserError, match="another reference or other prompts"):
        service.handle(request | {"step": step | {"ground": "0" * 64}})


@pytest.mark.parametrize("spoil", ["negative token", "question", "counts", "lengths"])
def test_answers_from_afar_are_checked(ground: Ground, spoil: str) -> None:
    sent = as_tensors(np.array([[0, 1], [1, 2]]), [[[4, 5], [6]], [[7], [8]]])
    places, answers = as_lists(sent)
    assert (places.tolist(), answers) == ([[0, 1], [1, 2]], [[[4, 5], [6]], [[7], [8]]])
    if spoil == "negative token":
        sent["tokens"][0] = -200
    elif spoil == "question":
        sent["places"][0, 1] = 99
    else:
        sent[spoil][0] += 1
    with pytest.raises(ValueError, match=r"do not fit|does not exist"):
        ground.public.candidates(*as_lists(sent))


def test_one_judge_is_that_judge_under_any_router(align_config: Path) -> None:
    for name, options in (("domain", []), ("uniform", ["align.router={name='uniform'}"])):
        result = done(align_config, f"one-{name}", "federate.silos=['lab']", *options)
        assert result.exit_code == 0, result.output
    assert weights_of(align_config, "one-domain") == weights_of(align_config, "one-uniform")


def test_who_counts_nothing_changes_nothing(align_config: Path) -> None:
    alone = "align.router={name='single', silo='clinic'}"
    for name, silos in (("all", "['clinic', 'lab', 'practice']"), ("two", "['clinic', 'lab']")):
        result = done(align_config, f"single-{name}", alone, f"federate.silos={silos}")
        assert result.exit_code == 0, result.output
    assert weights_of(align_config, "single-all") == weights_of(align_config, "single-two")


def test_a_heavy_distance_keeps_the_reference(align_config: Path) -> None:
    assert done(align_config, "heavy", "align.beta=1e6", "align.learning_rate=1e-4").exit_code == 0
    assert done(align_config, "light", "align.beta=1e-6", "align.learning_rate=1e-4").exit_code == 0
    reference = load_file(run_of(align_config, "reference").path / "projector.safetensors")

    def kl(name: str) -> float:
        return max(row["kl"] for row in run_of(align_config, name).history if row["client"] is None)

    assert kl("heavy") < kl("light")
    assert all(torch.isfinite(tensor).all() for tensor in reference.values())


def test_too_far_from_the_reference_it_ends_with_the_last_that_was_near(align_config: Path) -> None:
    result = done(align_config, "far", "align.kl_limit=1e-9", "align.steps=8")
    assert result.exit_code == 0, result.output
    assert "above align.kl_limit" in result.output
    run = run_of(align_config, "far")
    assert run.manifest["align"]["stopped"]
    assert not run.history
    reference = (run_of(align_config, "reference").path / "projector.safetensors").read_bytes()
    assert (run.path / "projector.safetensors").read_bytes() == reference


def test_the_last_steps_are_within_the_limit_too(align_config: Path) -> None:
    result = done(align_config, "last", "align.kl_limit=1e-9", "align.steps=2")
    assert "above align.kl_limit" in result.output
    reference = (run_of(align_config, "reference").path / "projector.safetensors").read_bytes()
    assert weights_of(align_config, "last") == reference


def test_what_diverges_is_no_finished_run(align_config: Path) -> None:
    result = done(
        align_config, "diverged", "align.learning_rate=1e20", "align.kl_limit=1e30", "align.steps=8"
    )
    assert result.exit_code != 0
    assert "lower align.learning_rate" in result.output
    assert Run.find(load(align_config).build / "runs/align/diverged") is None


def test_another_template_of_questions_is_another_run(aligned: Path) -> None:
    changed = load(aligned, ["run=mor", "language.question_template=v1"])
    service = Service(changed, "clinic")
    ours = Service(load(aligned, ["run=mor"]), "clinic").handle({"kind": "hello"})["terms"]
    with pytest.raises(UserError, match="question_template"):
        service.handle({"kind": "align", "silo": "clinic", "terms": ours, "step": {"step": "margins"}})
    assert (
        "question_template"
        in done(aligned, "mor", "language.question_template=v1", command="evaluate").output
    )


def test_a_site_decides_how_it_fits(aligned: Path) -> None:
    server = load(aligned, ["run=own-epochs", "sites.join_timeout=5", "sites.round_timeout=60"])
    own = load(aligned, ["run=own-epochs", "align.reward={name='cross', epochs=2, width=8, heads=2}"])
    services = {n: Service(own if silo == "lab" else server, silo) for n, silo in enumerate(SILOS)}
    run = align(server, over(FakeLink(services)))
    ours = run_of(aligned, "mor").manifest["align"]["rewards"]
    differing = {silo for silo, content in run.manifest["align"]["rewards"].items() if content != ours[silo]}
    assert differing == {"lab"}


def test_everybody_must_send_what_is_averaged(ground: Ground) -> None:
    answer = {"content": "0" * 64, "accuracy": 0.5, "pairs": 3, "state": {"w": torch.ones(2)}}
    jury = Jury(ground, SILOS, lambda steps: {name: answer for name in steps})
    jury.fit(2, dict.fromkeys(SILOS, 2))
    without = {key: value for key, value in answer.items() if key != "state"}
    jury = Jury(ground, SILOS, lambda steps: {n: without if n == "lab" else answer for n in steps})
    with pytest.raises(UserError, match="site 'lab' answered with state that is no set of weights"):
        jury.fit(2, dict.fromkeys(SILOS, 2))


def test_public_questions_that_cannot_be_asked_are_left_out(align_config: Path, tmp_path: Path) -> None:
    path = write_llava(tmp_path / "odd", 4, 9000)
    entries = json.loads(path.read_text())
    entries[0]["conversations"][0]["value"] = "<image> and <image>?"
    path.write_text(json.dumps(entries))
    source = f"extract.silos.odd={{name='llava_json', path='{path}', images='{path.parent}'}}"
    options = [source, f"features='{tmp_path}/features'", "align.prompts=['odd']"]
    assert done(align_config, "odd", *options, command="extract").exit_code == 0
    result = done(align_config, "odd", *options)
    assert "odd: 1 public questions cannot be asked and are left out" in result.output
    assert result.exit_code == 0, result.output


def test_kinds_that_the_mixture_cannot_judge_are_left_out(align_config: Path) -> None:
    result = done(align_config, "gate", "align.least=1.0")
    assert result.exit_code == 2
    assert "ranks too few public preferences right in every kind" in result.output
    assert "left out" in result.output


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("averaged", ["align.average=2"]),
        ("dpo", ["align.method='dpo'", "align.average=2"]),
        ("sft", ["align.method='sft'", "align.average=1"]),
        ("truth", ["align.reward={name='truth'}", "align.router={name='uniform'}"]),
        ("learned", ["align.router={name='learned', steps=5}"]),
        ("cross", ["align.reward={name='cross', epochs=1, width=8, heads=2}"]),
        ("head", ["align.reward={name='head', epochs=1, width=8}"]),
        ("other projector", ["align.rewards={lab={name='likelihood', epochs=1, projector={name='linear'}}}"]),
        ("resampler", ["align.rewards={lab={name='likelihood', epochs=1, projector={name='resampler'}}}"]),
        ("lora", ["federate.adapter={rank=2, alpha=4}"]),
        ("lora dpo", ["federate.adapter={rank=2, alpha=4}", "align.method='dpo'", "align.average=1"]),
        ("none", ["align.steps=0"]),
    ],
)
def test_every_way_runs(align_config: Path, name: str, options: list[str]) -> None:
    name = name.replace(" ", "-")
    result = done(align_config, name, *options)
    assert result.exit_code == 0, result.output
    run = run_of(align_config, name)
    reference = (run_of(align_config, "reference").path / "projector.safetensors").read_bytes()
    moved = (run.path / "projector.safetensors").read_bytes() != reference
    assert moved == (name != "none")
    if name.startswith("lora"):
        assert any(tensor.any() for key, tensor in run.adapter().items() if "lora_B" in key)
    if name == "averaged":
        files = [file.read_bytes() for file in (run.path.parents[2] / "rewards").glob("*.safetensors")]
        assert max(map(files.count, files)) == 3


def test_a_reward_with_a_language_model_of_its_own(align_config: Path, llama_dir: Path) -> None:
    reward = f"align.rewards={{lab={{name='likelihood', epochs=1, language='{llama_dir}'}}}}"
    result = done(align_config, "own-language", reward)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["federate.initial=nowhere"], "nowhere"),
        (["align.prompts=['clinic']"], "clinic judges, too"),
        (["align.rewards={nobody={name='cross'}}"], "none of federate.silos"),
        (["federate.privacy={clip=1.0}"], "federate.privacy: does nothing with"),
        (["federate.strategy.name=fedprox"], "federate.strategy.name = 'fedprox': does nothing"),
        (["federate.passes=2"], "federate.passes: does nothing"),
        (["align.reward={name='cross', width=64, heads=3}"], "no multiple of heads = 3"),
        (["align.reward={name='truth', pattern='('}"], "no regular expression"),
        (["align.average=2", "align.rewards={lab={name='cross'}}"], "align.average"),
        (["align.method='dpo'"], "align.average = 0"),
        (["align.reward={name='cros'}"], "did you mean 'cross'"),
        (["align.router={name='domain', uniform=2}"], "align.router.uniform"),
        (["align.prompts=['heldout']"], "no training text whose question"),
    ],
)
def test_what_cannot_be_is_refused(align_config: Path, options: list[str], message: str) -> None:
    result = done(align_config, "refused", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_without_align_there_is_nothing_to_align(sites_config: Path) -> None:  # noqa: F811
    result = CliRunner().invoke(main, ["align", str(sites_config)])
    assert result.exit_code == 2
    assert "no [align]" in result.output


def test_preferences_are_no_training_texts(align_config: Path) -> None:
    result = done(align_config, "ordinary", command="show")
    assert result.exit_code == 0
    experiment = load(align_config, ["run=ordinary"]).model_copy(update={"align": None})
    cache = open_cache(experiment, "clinic")
    assert not len(cache.usable_texts("train"))
    assert len(cache.usable_texts("train", preferences=True)) == 24
    with pytest.raises(UserError, match="no training text"):
        federate(experiment)


def test_drawn_answers_go_to_the_likeliest_as_it_gets_cold(ground: Ground) -> None:
    places = ground.public.questions([0, 1], 0, 6, 0)
    asked = ground.public.candidates(places, [[[]]] * 6)
    visual, owners = ground.model.visual(asked.features), asked.owners.tolist()
    ends = ground.asking.ends(asked.texts[0])
    with torch.inference_mode():
        likeliest = greedy(ground.language, asked.prompts, visual, owners, length=5, ends=ends)
        several = drawn(
            ground.language,
            asked.prompts,
            visual,
            owners,
            copies=2,
            length=5,
            ends=ends,
            temperature=1e-6,
            generator=torch.Generator().manual_seed(0),
        )
    assert several[::2] == several[1::2] == likeliest


def test_the_same_seed_draws_the_same_and_another_does_not(ground: Ground) -> None:
    places = ground.public.questions([0, 1], 0, 6, 0)
    draws = [sample(ground.model, ground, places, [seed], 3, 5, 8).answers for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert all(1 <= len(answer) <= 5 for answer in draws[0])


@torch.no_grad()
def test_padded_or_alone_answers_are_as_likely(ground: Ground) -> None:
    places = ground.public.questions([0, 1], 0, 4, 0)
    together = ground.public.candidates(places, [[[5, 6, 7, 8]], [[5]], [[9, 5]], [[7, 7, 7]]])
    values, rows = log_probs(ground.model, together, ground.model.visual(together.features))
    for row in range(4):
        alone = together.part([row])
        own, _ = log_probs(ground.model, alone, ground.model.visual(alone.features))
        torch.testing.assert_close(values[rows == row], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reward", ["likelihood", "head", "cross"])
def test_exchanged_answers_reverse_the_margin(align_config: Path, ground: Ground, reward: str) -> None:
    from fedcmp.federate.preference.pairs import read_pairs
    from fedcmp.federate.preference.rewards import REWARDS, Setting
    from fedcmp.pipeline.options import Component

    experiment = load(align_config)
    cache = open_cache(experiment, "lab")
    pairs, _ = read_pairs(cache, ground.asking)
    setting = Setting(
        ground.asking,
        ground.model,
        experiment.federate.projector,
        ground.d_vision,
        torch.Generator().manual_seed(0),
    )
    judge = REWARDS.build(Component(name=reward), "align.reward").judge(setting)
    candidates = pairs.candidates(range(4))
    with torch.no_grad():
        margin = judge(candidates).view(-1, 2).diff(dim=1)
        turned = judge(candidates.part([1, 0, 3, 2, 5, 4, 7, 6])).view(-1, 2).diff(dim=1)
    torch.testing.assert_close(margin, -turned, atol=1e-5, rtol=1e-4)


def test_the_rewards_that_were_fitted_are_found_again_and_others_are_not(
    aligned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcmp.federate.preference import judges

    fitted = []
    fit = judges.fit

    def counted(*args: object, **options: object) -> object:
        fitted.append(1)
        return fit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(judges, "fit", counted)
    monkeypatch.setattr(training, "history", training.history)
    assert done(aligned, "mor", "align.steps=6").exit_code == 0
    assert not fitted
    for spoiled in (run_of(aligned, "mor").path.parents[2] / "rewards").glob("*.safetensors"):
        spoiled.write_bytes(spoiled.read_bytes()[:-4] + b"\0\0\0\0")
    assert done(aligned, "mor", "align.steps=4").exit_code == 0
    assert len(fitted) == 3


def test_preferences_that_cannot_be_asked_are_left_out_with_a_reason(ground: Ground) -> None:
    from fedcmp.federate.preference.pairs import read_pairs
    from fedcmp.pipeline.records import Text, Turn

    asked = ["<image>\nIs it red?", "<image> and <image>: which is red?", "<image>\nIs it green?"]
    texts = [Text((Turn("user", each), Turn("assistant", "yes")), "train", "no") for each in asked]
    long = Text((Turn("user", "red " * 500), Turn("assistant", "yes")), "train", "no")
    texts += [long, Text(texts[0].turns, "train", "yes ")]

    class Cache:
        text_image = np.arange(5)

        def usable_texts(self, split: str, *, preferences: bool) -> np.ndarray:
            assert preferences
            return np.arange(5)

        def text(self, index: int) -> Text:
            return texts[index]

    pairs, left_out = read_pairs(Cache(), ground.asking)  # type: ignore[arg-type]
    assert len(pairs) == 2
    assert list(left_out) == [1, 3, 4]
    assert "refers to 2 images" in left_out[1]
    assert "language.max_length" in left_out[3]
    assert "the same tokens" in left_out[4]
    kept, held_out = pairs.divided(3)
    assert (len(kept), len(held_out)) == (1, 1)


def test_an_ablation_of_alignments_ends_in_a_table(aligned: Path, tmp_path: Path) -> None:
    path = tmp_path / "alignments.toml"
    path.write_text(
        f"""
name = "alignments"
seeds = [0, 1]
measures = ["loss: loss"]
baseline = "reference"
subject = "mor"
set = ["build={tmp_path}/build"]
[scenarios]
here = "{aligned}"
[strategies]
reference = {{ name = "fedavg", "align.steps" = 0 }}
mor = {{ name = "fedavg", "align.steps" = 2 }}
"""
    )
    result = CliRunner().invoke(
        main, ["ablate", str(path), "--jobs", "1", "--out", str(tmp_path / "table.md")]
    )
    assert result.exit_code == 0, result.output
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert any(line.startswith("| mor |") for line in rows)
    assert any(line.startswith("| reference |") for line in rows)
    assert "Local training" not in result.output
