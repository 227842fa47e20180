"""What `[align]` may say: how a projector is aligned with what silos prefer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fedcmp.pipeline.options import Component, Name, Options


class Align(Options):
    """The second half of stage two: `federate.initial` is the reference, and what is trained starts from it.

    `prompts` are silos whose questions everybody may see; each is a kind of prompt, and their answers are
    not used. `federate.silos` judge: each trains a reward model on its own preferences, `reward` or its own
    of `rewards`, and is tested on those about every `hold_out`th picture. `router` says how much each
    counts for a prompt. GRPO takes `steps` of `learning_rate`, each on `prompts_per_step` prompts with
    `num_generations` sampled answers of at most `max_new_tokens`, which are sampled for
    `steps_per_generation` steps at once. `beta` weights the distance from the reference (KL), and training
    ends where that exceeds `kl_limit` nats a token. `calibration` prompts of each kind set the rewards'
    common scale. A kind of prompt of whose public preferences the mixture ranks no more than `least` right
    is left out.

    `method` in place of `grpo`: `dpo` and `sft` (on what was chosen) train the policy itself at the silos,
    and average it over `average` rounds. With `grpo`, `average` rounds make one reward model of all by
    averaging them. These send weights; they are what the mixture is compared with.
    """

    prompts: tuple[Name, ...] = Field(min_length=1)
    method: Literal["grpo", "dpo", "sft"] = "grpo"
    steps: int = Field(120, ge=0)
    prompts_per_step: int = Field(6, ge=1)
    num_generations: int = Field(8, ge=2)
    steps_per_generation: int = Field(4, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    scale_rewards: Literal["group", "batch", "none"] = "group"
    epsilon: float = Field(0.2, gt=0, lt=1)
    beta: float = Field(0.5, gt=0)
    kl_limit: float = Field(0.5, gt=0)
    least: float = Field(0.6, ge=0, le=1)
    calibration: int = Field(24, ge=2)
    hold_out: int = Field(10, ge=2)
    reward: Component = Field(default_factory=lambda: Component(name="likelihood"))
    rewards: dict[Name, Component] = Field(default_factory=dict)
    router: Component = Field(default_factory=lambda: Component(name="domain"))
    average: int = Field(0, ge=0)

    def reward_of(self, silo: str) -> Component:
        """What a silo judges with."""
        return self.rewards.get(silo, self.reward)

    def as_built(self, silos: tuple[str, ...]) -> dict[str, Any]:
        """JSON value as identities hold it: every silo's reward model written out."""
        return self.agreed() | {"rewards": {silo: self.reward_of(silo).as_built() for silo in silos}}

    def agreed(self) -> dict[str, Any]:
        """The same without what every silo decides for itself."""
        return self.model_dump(mode="json", exclude={"reward", "rewards", "router"}) | {
            "router": self.router.as_built()
        }

    @field_validator("prompts")
    @classmethod
    def _named_once(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(prompts)) < len(prompts):
            raise ValueError("names a silo more than once")
        return prompts
