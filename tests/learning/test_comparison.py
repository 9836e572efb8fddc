from __future__ import annotations

import numpy as np
import optuna
import pytest

from optuna_lora_rl.learning.comparison import FUNCTIONS
from optuna_lora_rl.learning.comparison import TEST_SEED
from optuna_lora_rl.learning.comparison import compare
from optuna_lora_rl.learning.comparison import main
from optuna_lora_rl.learning.comparison import paired_interval
from optuna_lora_rl.learning.comparison import peers
from optuna_lora_rl.learning.comparison import synthetic_problem
from optuna_lora_rl.learning.comparison import tables
from optuna_lora_rl.learning.tasks import draw_tasks


@pytest.mark.parametrize(
    ("problem", "params"),
    [
        (FUNCTIONS[0], {"x": np.pi, "y": 2.275}),
        (
            FUNCTIONS[1],
            dict(
                zip(
                    [f"x{i}" for i in range(6)],
                    [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573],
                    strict=True,
                )
            ),
        ),
        (FUNCTIONS[2], {"x0": 1.3, "x1": 1.3, "x2": 1.3, "k": 7, "kind": "a", "scale": 0.01}),
    ],
)
def test_the_functions_have_no_regret_at_their_known_optima(problem, params) -> None:  # type: ignore[no-untyped-def]
    _, regret = problem.run(optuna.trial.FixedTrial(params), np.random.default_rng(0))
    assert regret == pytest.approx(0.0, abs=1e-4)


def test_a_comparison_pairs_samplers_on_the_same_problems() -> None:
    tasks = draw_tasks(2, seed=TEST_SEED)
    problems = [synthetic_problem(tasks, row) for row in range(2)]
    makers = {name: peers()[name] for name in ("rl", "random")}
    curves = compare(problems, makers, seeds=1, trials=5)
    assert curves["rl"].shape == (2, 1, 5)
    assert (np.diff(curves["rl"], axis=2) <= 0).all()
    text = "\n".join(tables(problems, curves))
    assert "| rl |" in text
    assert "log10 random - rl" in text


def test_the_interval_widens_with_the_spread_over_problems() -> None:
    rng = np.random.default_rng(0)
    narrow = paired_interval(0.2 + 0.01 * rng.normal(size=(20, 3)))
    wide = paired_interval(0.2 + 1.0 * rng.normal(size=(20, 3)))
    assert narrow[1] > 0.15
    assert wide[2] - wide[1] > 10 * (narrow[2] - narrow[1])


def test_the_command_line_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    verbosity = optuna.logging.get_verbosity()
    main(["--tasks", "1", "--seeds", "1", "--trials", "3", "--samplers", "rl,random"])
    optuna.logging.set_verbosity(verbosity)
    assert "mean regret after trials" in capsys.readouterr().out
