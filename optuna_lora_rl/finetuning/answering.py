"""A model's answers to held-out questions, to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.finetuning import questions
from optuna_lora_rl.finetuning.data import draw
from optuna_lora_rl.finetuning.files import Row
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.preparation import longest

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.workspace import Workspace


@dataclass(frozen=True)
class Answers:
    """What a model says to held-out questions.

    Attributes:
        split: Where the questions come from: ``test``, or ``validation`` where there is no test.
        questions: What is asked; of a chat its last turn.
        expected: What should be said.
        given: What is said.
    """

    split: str
    questions: tuple[str, ...]
    expected: tuple[str, ...]
    given: tuple[str, ...]

    @property
    def right(self) -> int:
        """How many are as expected, but for outer spaces."""
        return sum(map(questions.is_exact, self.given, self.expected))


def answers(
    workspace: Workspace, model: Any, count: int, *, on_activity: OnActivity = unseen
) -> Answers | None:
    """Lets a model answer held-out questions, greedily.

    Args:
        workspace: Of the study; its objective says how long answers may be.
        model: The model as it stands.
        count: How many questions, drawn by content and the data's seed, the same for each model.
        on_activity: Told how far it is.

    Returns:
        None where the data ask nothing, or answers leave no room for a question.
    """
    prepared, objective = workspace.prepared, workspace.objective
    splits, tokenizer = prepared.splits, prepared.base.tokenizer
    rows = splits.validation if splits.test is None else splits.test
    room = longest(prepared.base, workspace.data) - objective.max_new_tokens
    chosen = draw([row for row in rows if _question(row)], count, workspace.data.seed)
    if not chosen or room < 1:
        return None
    with quiet(), own_randomness():
        asked = questions.questions(
            chosen, tokenizer, count=count, seed=workspace.data.seed, longest_prompt=room
        )
        given = questions.answers(
            model,
            tokenizer,
            asked,
            max_new_tokens=objective.max_new_tokens,
            batch_size=workspace.training.eval_batch_size,
            on_activity=on_activity,
        )
    split = "validation" if splits.test is None else "test"
    return Answers(split, tuple(map(_question, chosen)), asked.answers, tuple(given))


def _question(row: Row) -> str:
    """The text of what a row asks; empty where it asks nothing, or has no answer in words."""
    asked, answer = questions.question_and_answer(row)
    if answer is None or not asked:
        return ""
    return asked if isinstance(asked, str) else _text(asked)


def _text(turns: Sequence[dict[str, Any]]) -> str:
    content = turns[-1].get("content")
    return content if isinstance(content, str) else str(turns[-1])
