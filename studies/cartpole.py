"""PPO as this package has it, checked on an environment that everybody knows: CartPole-v1.

    python studies/cartpole.py

The update is ``optuna_lora_rl.policy.ppo``; around it stand the hyperparameters and the loop of
cleanrl's ppo.py (Huang et al. 2022; 4 environments, 128 steps a rollout, 500,000 steps, learning
rate 2.5e-4 annealed to 0). CartPole-v1 counts as solved at a mean return of 475 over 100 episodes;
the most that an episode can return is 500.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.policy import ppo
from optuna_lora_rl.study.charts import Series
from optuna_lora_rl.study.charts import chart

SOLVED = 475.0
STEM = Path(__file__).resolve().parent / "results" / "cartpole"
SETTINGS = ppo.PPOSettings(
    learning_rate=2.5e-4,
    gamma=0.99,
    gae_lambda=0.95,
    clip_coef=0.2,
    ent_coef=0.01,
    vf_coef=0.5,
    max_grad_norm=0.5,
    update_epochs=4,
    minibatch_size=128,
    target_kl=float("inf"),
    clip_vloss=True,
)
ENVIRONMENTS, STEPS = 4, 128


class Agent(nn.Module):
    """Separate networks for policy and value, 2 x 64, orthogonal initialisation."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.actor = _network(observations, actions, 0.01)
        self.critic = _network(observations, 1, 1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the actions, shape (m, A), and values, shape (m,)."""
        log_p = torch.log_softmax(self.actor(observation), -1)
        return log_p, self.critic(observation)[:, 0]


def _network(inputs: int, outputs: int, scale: float) -> nn.Sequential:
    sizes = ((inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, outputs, scale))
    layers: list[nn.Module] = []
    for fan_in, fan_out, gain in sizes:
        layer = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(
    seed: int,
    total: int,
    *,
    environments: int = ENVIRONMENTS,
    settings: ppo.PPOSettings = SETTINGS,
    report: Callable[[dict[str, float]], None] = lambda entry: None,
) -> list[dict[str, float]]:
    """Train for ``total`` steps; one entry a rollout: steps, mean return of the last 100 episodes
    (of those there are), and the metrics of the update.
    """
    torch.manual_seed(seed)
    envs = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1")] * environments,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    agent = Agent(4, 2)
    optimizer = torch.optim.Adam(agent.parameters(), lr=settings.learning_rate, eps=1e-5)
    generator = torch.Generator().manual_seed(seed)
    returns: deque[float] = deque(maxlen=100)
    running, curve = np.zeros(environments), []
    observation = torch.from_numpy(envs.reset(seed=seed)[0])
    updates = total // (environments * STEPS)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - update / updates)
        rows: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for _ in range(STEPS):
                log_p, value = agent(observation)
                action = torch.multinomial(log_p.exp(), 1, generator=generator)
                seen, reward, terminated, truncated, _ = envs.step(action[:, 0].numpy())
                done = terminated | truncated
                running += reward
                returns.extend(running[done].tolist())
                running[done] = 0.0
                chosen = log_p.gather(1, action)[:, 0]
                paid = torch.from_numpy(reward).float()
                over = torch.from_numpy(done)
                rows.append((observation, action[:, 0], chosen, value, paid, over))
                observation = torch.from_numpy(seen)
            last_value = agent(observation)[1]
        metrics = _learn(agent, optimizer, rows, last_value, settings, generator)
        mean = sum(returns) / len(returns) if returns else float("nan")
        done_steps = (update + 1) * environments * STEPS
        curve.append({"steps": done_steps, "episodes": len(returns), "return": mean, **metrics})
        report(curve[-1])
    envs.close()
    return curve


def _learn(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rows: list[tuple[Tensor, ...]],
    last_value: Tensor,
    settings: ppo.PPOSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    observations, actions, logprobs, values, rewards, dones = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    advantages = ppo.generalised_advantages(
        rewards,
        values,
        dones,
        last_value,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
    )
    arrays = (actions, logprobs, advantages, advantages + values, values)
    data = ppo.Transitions(*(array.flatten(0, 1) for array in arrays))
    seen = observations.flatten(0, 1)
    return ppo.update(
        lambda rows: agent(seen[rows]), agent.parameters(), optimizer, data, settings, generator
    )


def solved_at(curve: list[dict[str, float]]) -> int | None:
    """Steps after which the last 100 episodes first returned 475 on average."""
    for entry in curve:
        if entry["episodes"] == 100 and entry["return"] >= SOLVED:
            return int(entry["steps"])
    return None


def figure(curves: dict[str, list[dict[str, float]]]) -> str:
    """The returns over the steps, one line a seed, as SVG."""
    colours = ("#0f766e", "#b45309", "#4338ca", "#be123c")
    lines = [
        Series([(e["steps"] / 1000, e["return"]) for e in curve], color=colours[number % 4])
        for number, curve in enumerate(curves.values())
    ]
    ends = max(curve[-1]["steps"] for curve in curves.values()) / 1000
    lines.append(Series([(0.0, SOLVED), (ends, SOLVED)], color="#cbd5e1"))
    return chart(lines, x="thousand environment steps", y="mean return of the last 100 episodes")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check PPO on CartPole-v1.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--output", type=Path, default=STEM, help="results, without suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    curves, runs = {}, []
    for seed in range(1, given.seeds + 1):
        started = time.process_time()
        curve = train(seed, given.steps)
        curves[str(seed)] = curve
        finals = [entry["return"] for entry in curve[-20:]]
        run: dict[str, Any] = {
            "seed": seed,
            "solved_at": solved_at(curve),
            "final_return": round(sum(finals) / len(finals), 1),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
        runs.append(run)
        print(json.dumps(run), flush=True)
    packages = {name: version(name) for name in ("torch", "gymnasium", "numpy")}
    thinned = {
        seed: [{name: round(value, 4) for name, value in entry.items()} for entry in curve[::8]]
        for seed, curve in curves.items()
    }
    record = {
        "command": " ".join(["python studies/cartpole.py", *(arguments or sys.argv[1:])]),
        "python": platform.python_version(),
        **packages,
        "runs": runs,
        "curves": thinned,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    given.output.with_suffix(".svg").write_text(figure(thinned) + "\n")


if __name__ == "__main__":
    main()
