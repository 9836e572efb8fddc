from __future__ import annotations

from optuna_lora_rl.samplers.memory import Memo
from optuna_lora_rl.samplers.memory import milestone


def test_a_memo_computes_once_and_forgets_the_oldest() -> None:
    memo, calls = Memo[str](size=2), []

    def ask(key: str) -> str:
        return memo.get(key, lambda: calls.append(key) or key)  # type: ignore[func-returns-value]

    assert [ask(key) for key in "aabacca"] == list("aabacca")
    assert calls == ["a", "b", "c"]
    ask("b")
    assert calls == ["a", "b", "c", "b"]


def test_milestones_are_every_trial_at_first_and_seldom_later() -> None:
    assert [milestone(n) for n in range(9)] == list(range(9))
    passed = {milestone(n) for n in range(10_000)}
    assert len(passed) < 80
    assert all(milestone(n) <= n < 1.25 * milestone(n) + 1 for n in range(10_000))
