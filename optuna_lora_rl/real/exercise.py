"""A question with its one right answer."""

from __future__ import annotations

from typing import NamedTuple


class Exercise(NamedTuple):
    """One example of a task.

    Attributes:
        subject: What is asked for, whatever the words: no two splits share it.
        question: What the user says.
        answer: What the assistant has to say.
    """

    subject: str
    question: str
    answer: str
