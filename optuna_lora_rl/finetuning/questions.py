"""What a model is asked, what it answers, and how often that is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING
from typing import Any

from jinja2 import TemplateError

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning.data import draw
from optuna_lora_rl.finetuning.files import Row

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_MARK = "((answer))"


@dataclass(frozen=True)
class Questions:
    """Prompts to answer and the answers expected.

    Attributes:
        prompts: Token ids of each prompt.
        answers: The expected text of each.
        end: The token with which the chat template ends an answer, or None.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]
    end: int | None = None


def questions(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    seed: int,
    longest_prompt: int,
) -> Questions:
    """Takes the questions of a generated metric from prompt/completion or chat examples.

    Args:
        rows: Validation or test examples.
        tokenizer: The model's tokenizer.
        count: How many to draw, by ``seed`` and content.
        seed: Decides which.
        longest_prompt: Tokens of a prompt that are kept, its last ones.

    Raises:
        UserError: When the examples are plain text, which asks nothing.
    """
    prompts: list[tuple[int, ...]] = []
    answers: list[str] = []
    end: int | None = None
    for row in draw(rows, count, seed):
        asked, answer = question_and_answer(row)
        if answer is None or asked == []:
            continue
        if isinstance(asked, str):
            ids = tokenizer(asked)["input_ids"]
            # A tokenizer that ends every text would end the prompt before the answer.
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
        else:
            ids = _rendered(asked, row.get("tools"), tokenizer)
            end = _end(asked, tokenizer) if end is None else end
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
        prompts.append(tuple(ids[-longest_prompt:] or [start]))
        answers.append(answer)
    if not prompts:
        raise UserError(
            "objective.metric: generated metrics need prompt/completion data, or chat data whose "
            "last message is the assistant's answer to another; take loss or token_accuracy"
        )
    return Questions(prompts=tuple(prompts), answers=tuple(answers), end=end)


def generated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Questions,
    *,
    max_new_tokens: int,
    batch_size: int,
    on_activity: OnActivity = unseen,
) -> dict[str, float]:
    """Answers the questions greedily and returns exact match, accuracy and macro F1."""
    given = answers(
        model,
        tokenizer,
        asked,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_activity=on_activity,
    )
    return compare(given, asked.answers)


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Questions,
    *,
    max_new_tokens: int,
    batch_size: int,
    on_activity: OnActivity = unseen,
) -> list[str]:
    """Generates an answer to each question, greedily, in left-padded batches."""
    import torch

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ends = _ends(model, tokenizer, asked)
    training = model.training
    model.eval()
    texts = [""] * len(asked.prompts)
    # Prompts of like length together: less padding, same answers.
    order = sorted(range(len(texts)), key=lambda index: (len(asked.prompts[index]), index))
    try:
        starts = range(0, len(order), batch_size)
        for start in counted(starts, "generating answers", "batches", on_activity):
            batch = order[start : start + batch_size]
            prompts = [asked.prompts[index] for index in batch]
            blank = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
            rows = [[pad] * n + list(prompt) for n, prompt in zip(blank, prompts, strict=True)]
            mask = [[0] * n + [1] * len(prompt) for n, prompt in zip(blank, prompts, strict=True)]
            with torch.no_grad():
                output = model.generate(  # type: ignore[operator]
                    input_ids=torch.tensor(rows, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad,
                    eos_token_id=ends or None,
                    use_cache=True,
                )
            for index, tokens in zip(batch, output[:, len(rows[0]) :], strict=True):
                said = list(takewhile(lambda token: token not in ends, tokens.tolist()))
                texts[index] = tokenizer.decode(said, skip_special_tokens=True)
    finally:
        model.train(training)
    return texts


def compare(given: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Returns exact match, accuracy and macro F1 of given answers against the expected ones."""
    from sklearn.metrics import f1_score

    exact = list(map(is_exact, given, expected))
    guesses = [_label(answer) for answer in given]
    labels = [_label(answer) for answer in expected]
    f1 = f1_score(labels, guesses, labels=sorted(set(labels)), average="macro", zero_division=0.0)
    return {
        "exact_match": sum(exact) / len(exact),
        "accuracy": sum(a == b for a, b in zip(guesses, labels, strict=True)) / len(labels),
        "f1": float(f1),
    }


def is_exact(given: str, expected: str) -> bool:
    """Whether an answer is the expected one but for outer spaces."""
    return given.strip() == expected.strip()


def _label(answer: str) -> str:
    lines = answer.strip().splitlines()
    return " ".join(lines[0].split()).casefold() if lines else ""


def _rendered(
    asked: list[dict[str, Any]], tools: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            asked,
            tools=None if tools is None else json.loads(tools),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
    except TemplateError as error:
        # What it accepts with the answer it may refuse without.
        start = " ".join(str(asked[0]["content"]).split())[:60]
        raise UserError(
            f"objective.metric: the chat template cannot ask the example that begins with "
            f"{start!r}: {first_line(error)}"
        ) from error
    return ids


def _end(asked: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int | None:
    # Base models of chat families end a text with another token than their template ends a turn.
    answer = {"role": "assistant", "content": _MARK}
    text = str(tokenizer.apply_chat_template([*asked, answer], tokenize=False))
    _, found, after = text.rpartition(_MARK)
    ids = tokenizer(after if found else "", add_special_tokens=False)["input_ids"]
    # Spaces may stand before it. Without such a token only end-of-text ends an answer: a bare
    # newline may as well stand within one.
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Questions) -> list[int]:
    own = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, asked.end]
    return sorted({token for token in ends if token is not None})


def question_and_answer(row: Row) -> tuple[Any, str | None]:
    """What a row asks, a text or turns, and the answer; None where nothing is said in words."""
    if "prompt" in row:
        completion = row["completion"]
        return row["prompt"], completion if isinstance(completion, str) else _said(completion)
    turns = row.get("messages", [])
    return turns[:-1], _said(turns[-1:])


def _said(turns: Sequence[Mapping[str, Any]]) -> str | None:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        return None
    content = turns[0]["content"]
    # Nothing said, as where tools are called, is nothing to compare with.
    return content if isinstance(content, str) and content.strip() else None
