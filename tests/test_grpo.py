"""The arithmetic of an alignment: advantages, clipped ratios, mixtures of rewards, routers, DPO."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedcmp.federate.preference.dpo import chosen_loss, dpo_loss
from fedcmp.federate.preference.grpo import advantages, terms
from fedcmp.federate.preference.mixture import (
    context,
    deviations,
    domain_gradient,
    fused,
    preference_loss,
    weights,
)
from fedcmp.federate.preference.routers import ROUTERS
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Component

EPSILON, BETA = 0.2, 0.15


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, beta: float = BETA) -> Tensor:
    new = new.clone().requires_grad_()
    terms(new, old, reference, advantage, epsilon=EPSILON, beta=beta).loss.mean().backward()
    assert new.grad is not None
    return new.grad


def test_equally_good_answers_leave_only_the_distance() -> None:
    assert not advantages(torch.full((3, 8), 2.5)).any()
    old, reference = drawn(0, 20), drawn(1, 20)
    alone = gradient(old, old, reference, torch.zeros(20))
    torch.testing.assert_close(alone, BETA / 20 * (1 - (reference - old).exp()))


@settings(max_examples=30)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 50), shift=st.floats(-50, 50))
def test_offsets_and_scales_of_rewards_cancel(seed: int, scale: float, shift: float) -> None:
    rewards = drawn(seed, 2, 5, 8)
    offsets = shift * drawn(seed + 1, 2, 5, 1)
    for each in (rewards, scale * rewards + offsets):
        calibrated = each / deviations(each)[:, None, None]
        torch.testing.assert_close(
            advantages(calibrated[0]),
            advantages((rewards / deviations(rewards)[:, None, None])[0]),
            atol=2e-3,
            rtol=2e-3,
        )


def test_at_the_reference_the_distance_is_zero_with_zero_gradient() -> None:
    old = drawn(0, 12)
    made = terms(old, old, old, torch.zeros(12), epsilon=EPSILON, beta=BETA)
    assert not made.kl.any()
    assert not gradient(old, old, old, torch.zeros(12)).any()
    assert (terms(old, old, old + drawn(1, 12), torch.zeros(12), epsilon=EPSILON, beta=BETA).kl > 0).all()


def test_a_ratio_beyond_the_clip_moves_no_further() -> None:
    old = torch.zeros(4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    made = terms(new, old, new, advantage, epsilon=EPSILON, beta=BETA)
    assert made.clipped.tolist() == [True, False, False, True]
    moved = gradient(new, old, new, advantage)
    assert [bool(each) for each in moved] == [False, True, True, False]


def test_the_loss_is_its_equation() -> None:
    new, old, reference, advantage = (drawn(seed, 9) for seed in range(4))
    expected = []
    for n, o, r, a in zip(*(each.tolist() for each in (new, old, reference, advantage)), strict=True):
        ratio, delta = np.exp(n - o), r - n
        kept = min(ratio * a, min(max(ratio, 1 - EPSILON), 1 + EPSILON) * a)
        expected.append(-kept + BETA * (np.exp(delta) - delta - 1))
    made = terms(new, old, reference, advantage, epsilon=EPSILON, beta=BETA)
    np.testing.assert_allclose(made.loss.numpy(), expected, rtol=1e-5)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), uniform=st.floats(0, 1), temperature=st.floats(0.1, 10))
def test_weights_are_shares(seed: int, uniform: float, temperature: float) -> None:
    pi = weights(drawn(seed, 4, 7), drawn(seed + 1, 5, 7), uniform=uniform, temperature=temperature)
    assert (pi >= uniform / 4 - 1e-6).all()
    torch.testing.assert_close(pi.sum(1), torch.ones(5))


def test_equal_reward_models_are_one_under_any_router() -> None:
    one = drawn(0, 6)
    for seed in range(3):
        pi = weights(drawn(seed, 3, 7), drawn(9, 6, 7), uniform=0.3)
        torch.testing.assert_close(fused(pi, one.expand(3, -1)), one)
    assert torch.equal(fused(torch.ones(6, 1), one[None]), one)


def test_who_counts_nothing_can_be_removed_to_the_bit() -> None:
    rewards = drawn(0, 3, 6)
    rewards[1] = torch.tensor(float("nan"))
    pi = weights(drawn(1, 2, 7), drawn(2, 6, 7), uniform=0.0)
    without = fused(pi, rewards[[0, 2]])
    beside = fused(torch.stack([pi[:, 0], torch.zeros(6), pi[:, 1]], 1), rewards)
    assert torch.equal(without, beside)


def test_a_reward_that_tells_nothing_apart_is_left_as_it_is() -> None:
    rewards = torch.stack([drawn(0, 4, 8), torch.ones(4, 8)])
    spread = deviations(rewards)
    assert spread[1] == 1
    assert deviations(torch.full((1, 9, 8), 0.1)) == 1
    torch.testing.assert_close(
        (rewards[0] - rewards[0].mean(1, keepdim=True)).div(spread[0]).square().mean(), torch.tensor(1.0)
    )


def test_the_context_has_the_lengths_of_its_equation() -> None:
    h = context(5 * drawn(0, 3, 8), drawn(1, 3, 8))
    torch.testing.assert_close(h[:, :8].norm(dim=1), torch.full((3,), 4.0))
    torch.testing.assert_close(h[:, 8:16].norm(dim=1), torch.full((3,), 4.0))
    assert h[:, 16].tolist() == [1, 1, 1]
    assert not context(drawn(0, 1, 8), torch.zeros(1, 8))[:, 8:16].any()


class Clients:
    """Prompts of three clients, asked one by one or as if pooled."""

    clients, width = ("a", "b", "c"), 5

    def __init__(self, pooled: bool = False) -> None:
        self.accuracies = {"a": 0.6, "b": 0.9, "c": None}
        self.own = [2 * drawn(place, 10 + place, 5) + place for place in range(3)]
        self.pooled = pooled

    def domain_gradient(self, omega: Tensor) -> tuple[Tensor, float]:
        number = sum(map(len, self.own))
        if self.pooled:
            every = omega.clone().requires_grad_()
            labels = torch.cat([torch.full((len(own),), place) for place, own in enumerate(self.own)])
            loss = torch.nn.functional.cross_entropy(torch.cat(self.own) @ every.T, labels)
            loss.backward()
            assert every.grad is not None
            return every.grad, float(loss.detach())
        parts = [domain_gradient(omega, own, place) for place, own in enumerate(self.own)]
        return sum(part for part, _ in parts) / number, float(sum(loss for _, loss in parts)) / number  # type: ignore[return-value]

    def margins(self) -> tuple[Tensor, Tensor]:
        h = torch.cat(self.own)
        return h, torch.stack([h[:, 0], -h[:, 0], 0.1 * h[:, 1]])


def router(name: str, **options: object):
    return ROUTERS.build(Component(name=name, **options), "align.router")  # type: ignore[arg-type]


def test_a_federated_router_is_pooled_regression() -> None:
    ours, pooled = (router("domain").fit(Clients(pooled)) for pooled in (False, True))
    torch.testing.assert_close(ours, pooled, atol=1e-6, rtol=1e-5)
    before, after = (Clients().domain_gradient(omega)[1] for omega in (torch.zeros(3, 5), ours))
    assert after < 0.6 * before


def test_a_learned_router_agrees_with_more_preferences() -> None:
    panel = Clients()
    h, margins = panel.margins()
    omega = router("learned").fit(panel)
    of = {"uniform": 0.0, "temperature": 1.0}
    assert preference_loss(omega, h, margins, **of) < preference_loss(torch.zeros(3, 5), h, margins, **of)
    with pytest.raises(UserError, match="nothing to learn"):
        router("learned", uniform=1.0).fit(panel)
    panel.margins = lambda: (torch.zeros(0, 5), torch.zeros(3, 0))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="needs preferences"):
        router("learned").fit(panel)


@pytest.mark.parametrize(("options", "best"), [({}, 1), ({"silo": "c"}, 2)])
def test_a_single_reward_is_the_best_or_the_one_that_is_named(options: dict[str, str], best: int) -> None:
    chosen = router("single", **options)
    h = torch.cat([drawn(0, 4, 4), torch.ones(4, 1)], 1)
    pi = weights(chosen.fit(Clients()), h, uniform=chosen.uniform)
    assert torch.equal(pi, torch.nn.functional.one_hot(torch.tensor([best] * 4), 3).float())
    with pytest.raises(UserError, match="none of a, b, c"):
        router("single", silo="d").fit(Clients())


def test_dpo_is_its_equation_and_half_a_bit_at_the_reference() -> None:
    new, reference = drawn(0, 6, 2), drawn(1, 6, 2)
    gained = new - reference
    expected = -logsigmoid(0.3 * gained[:, 0] - 0.3 * gained[:, 1]).mean()
    torch.testing.assert_close(dpo_loss(new, reference, 0.3), expected)
    torch.testing.assert_close(dpo_loss(new, new, 0.3), torch.tensor(2.0).log())
    assert chosen_loss(torch.tensor([[-6.0, -1.0], [-2.0, -9.0]]), torch.tensor([[3, 1], [1, 1]])) == 2
