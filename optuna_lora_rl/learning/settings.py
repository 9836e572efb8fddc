"""What a training run may say in its YAML file, such as ``studies/policy.yaml``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import field_validator

from optuna_lora_rl.learning.rollouts import Teaching
from optuna_lora_rl.policy.ppo import PPOSettings

_PPO = PPOSettings()
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Rate = Annotated[float, Field(gt=0.0)]


class PPOSection(BaseModel):
    """Hyperparameters of PPO; see :class:`~optuna_lora_rl.policy.ppo.PPOSettings`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: _Rate = 1.5e-4
    gamma: _Share = _PPO.gamma
    gae_lambda: _Share = _PPO.gae_lambda
    clip_coef: _Rate = _PPO.clip_coef
    ent_coef: Annotated[float, Field(ge=0.0)] = _PPO.ent_coef
    vf_coef: Annotated[float, Field(ge=0.0)] = _PPO.vf_coef
    max_grad_norm: _Rate = _PPO.max_grad_norm
    update_epochs: Annotated[int, Field(ge=1)] = _PPO.update_epochs
    minibatch_size: Annotated[int, Field(ge=2)] = _PPO.minibatch_size
    target_kl: _Rate = _PPO.target_kl

    def settings(self) -> PPOSettings:
        """As the algorithm takes them."""
        return PPOSettings(**self.model_dump())


class TrainingSettings(BaseModel):
    """What a training run depends on.

    Args:
        seed: of tasks, networks and episodes.
        curriculum_updates: rollouts at the start on small, clean tasks only (at most three
            parameters, results at once, nothing pruned); they count as imitation.
        imitation_updates: rollouts learnt from by imitation, first.
        ppo_updates: rollouts learnt from by PPO, afterwards.
        transitions: trials a rollout, all its studies together.
        lengths: numbers of trials that a study may have; each rollout draws one.
        tasks: size of the pool of training tasks.
        measured_share: share of the LoRA tasks that are cut out of measured tables.
        validation_tasks: tasks kept apart for choices, equally many of each group.
        validate_every: updates between validations.
        width: of the networks' hidden layers.
        imitation_learning_rate: of Adam while imitating.
        surfaces: whether LoRA studies begin with the bank of response surfaces, of which, and of
            what is known of the run and of costs, the network then sees what it says.
        scaled: whether tasks are cut out of the tables with scale in them as well.
        contexts: whether most LoRA tasks know something of model, data and run, some of it wrong,
            and half of those that charge for cost know what.
        lora_share: share of the tasks that are LoRA ones.
        opened: share of the studies that begin with trials of somebody else.
        linear_reward: weight of the decrease of the regret itself in the reward of the first five
            trials, beside that of its logarithm.
        lookahead: weight of what the surfaces say two trials ahead in what is imitated from the
            second to the fifth trial; the rest is what each candidate would have earned.
        ppo: hyperparameters of PPO.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0)] = 0
    curriculum_updates: Annotated[int, Field(ge=0)] = 20
    imitation_updates: Annotated[int, Field(ge=0)] = 140
    ppo_updates: Annotated[int, Field(ge=0)] = 60
    transitions: Annotated[int, Field(ge=50)] = 2048
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = (5, 8, 10, 12, 16, 20, 30)
    tasks: Annotated[int, Field(ge=1)] = 4000
    measured_share: _Share = 0.65
    validation_tasks: Annotated[int, Field(ge=4)] = 640
    validate_every: Annotated[int, Field(ge=1)] = 25
    width: Annotated[int, Field(ge=1)] = 64
    imitation_learning_rate: _Rate = 1e-3
    surfaces: bool = False
    scaled: bool = False
    contexts: bool = False
    lora_share: _Share = 0.75
    opened: _Share = 0.0
    linear_reward: Annotated[float, Field(ge=0.0)] = 0.0
    lookahead: _Share = 0.0
    ppo: PPOSection = PPOSection()

    @field_validator("lengths")
    @classmethod
    def _some(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if not lengths:
            raise ValueError("lengths is [], but must hold at least one number of trials")
        return lengths

    @property
    def teaching(self) -> Teaching:
        """How episodes are begun, rewarded and learnt from."""
        return Teaching(self.opened, self.linear_reward, self.lookahead)

    @property
    def updates(self) -> int:
        """Updates in the whole run."""
        return self.imitation_updates + self.ppo_updates
