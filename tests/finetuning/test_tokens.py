from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import tokens
from optuna_lora_rl.finetuning.data import Kind
from optuna_lora_rl.finetuning.data import Splits
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.questions import questions
from optuna_lora_rl.finetuning.tokens import Tokens
from optuna_lora_rl.finetuning.tokens import tokenise

TURNS = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def base(random_llama: Path) -> Any:
    import torch

    from optuna_lora_rl.finetuning import model

    return model.load(ModelOptions(name=str(random_llama)), torch.device("cpu"))


def made(
    base: Any, kind: Kind, rows: list[dict[str, Any]], max_length: int = 16, **extra: Any
) -> Tokens:
    splits = Splits(kind=kind, train=rows, validation=rows, test=None)
    training = TrainingOptions(extra=extra)
    return tokenise(splits, base, training, max_length=max_length, use_cpu=True)


def learnt(base: Any, tokens: Tokens) -> list[str]:
    return [
        base.tokenizer.decode([token for token in labels if token != -100])
        for labels in tokens.train["labels"]
    ]


def test_completions_are_learnt_and_prompts_are_not(base: Any) -> None:
    tokens = made(base, "prompt-completion", [{"prompt": "1+1=", "completion": "2"}])
    assert learnt(base, tokens) == ["2</s>"]
    assert base.tokenizer.decode(tokens.train["input_ids"][0]) == "1+1=2</s>"
    assert tokens.lengths == [6]


def test_text_and_chat_are_learnt_whole(base: Any) -> None:
    assert learnt(base, made(base, "text", [{"text": "abc"}])) == ["abc</s>"]
    assert learnt(base, made(base, "messages", [{"messages": TURNS}])) == ["u>2?\na>yes\n"]


def test_chat_prompts_with_completions_are_learnt_in_their_completion(base: Any) -> None:
    row = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert learnt(base, made(base, "prompt-completion", [row])) == ["yes\n"]


def test_long_examples_are_cut_and_those_without_anything_to_learn_counted(base: Any) -> None:
    rows = [{"prompt": "12", "completion": "345678"}, {"prompt": "12345678", "completion": "9"}]
    tokens = made(base, "prompt-completion", rows, max_length=5)
    assert tokens.lengths == [5]
    assert learnt(base, tokens) == ["345"]
    # Once in training, once in validation.
    assert tokens.unlearnable == 2


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
def test_long_examples_are_cut_at_the_end_that_trl_is_told(base: Any) -> None:
    rows = [{"text": "12345678"}]
    for mode, kept in (("keep_start", "12345"), ("keep_end", "5678</s>")):
        assert learnt(base, made(base, "text", rows, 5, truncation_mode=mode)) == [kept]


def test_nothing_to_learn_at_all_is_refused(base: Any) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: within 3 tokens no train example"):
        made(base, "prompt-completion", [{"prompt": "12345", "completion": "6"}], max_length=3)


def test_chat_without_a_template_is_refused(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="messages examples cannot be tokenised") as refused:
        made(base, "messages", [{"messages": TURNS}])
    assert "\n" not in str(refused.value)


def test_a_template_that_refuses_an_example_names_it(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
    ) + base.tokenizer.chat_template
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    rows = [
        {"messages": TURNS},
        {"messages": [{"role": "system", "content": "be\nbrief"}, *TURNS]},
    ]
    with pytest.raises(UserError) as refused:
        made(base, "messages", rows)
    assert "at the example that begins with 'be brief': System role not" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_is_given_the_tools(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for tool in tools or [] %}{{ tool['name'] }};{% endfor %}"
    monkeypatch.setattr(base.tokenizer, "chat_template", template + base.tokenizer.chat_template)
    rows = [{"messages": TURNS, "tools": '[{"name": "look"}]'}, {"messages": TURNS, "tools": None}]
    assert learnt(base, made(base, "messages", rows)) == [
        "look;u>2?\na>yes\n",
        "u>2?\na>yes\n",
    ]
    asked = questions(rows, base.tokenizer, count=9, seed=0, longest_prompt=64)
    decoded = {base.tokenizer.decode(prompt) for prompt in asked.prompts}
    assert decoded == {"look;u>2?\na>", "u>2?\na>"}


def test_preparation_leaves_the_model_as_it_was(base: Any) -> None:
    attributes = set(base.model.__dict__)
    made(base, "text", [{"text": "abc"}])
    assert set(base.model.__dict__) == attributes


class TestCache:
    ROWS = ({"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"})

    @pytest.fixture
    def preparations(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Counts how often TRL prepares."""
        counted: list[int] = []
        own = tokens._prepare

        def prepare(*arguments: Any) -> Any:
            counted.append(1)
            return own(*arguments)

        monkeypatch.setattr(tokens, "_prepare", prepare)
        return counted

    def made(self, base: Any, cache: Path | None, **changed: Any) -> Tokens:
        rows = changed.pop("rows", list(self.ROWS))
        splits = Splits(kind="prompt-completion", train=rows, validation=rows[:1], test=None)
        training = TrainingOptions(extra=changed.pop("extra", {}))
        return tokenise(
            splits,
            base,
            training,
            max_length=changed.pop("max_length", 16),
            use_cpu=True,
            cache=cache,
        )

    def test_tokens_are_made_once_and_are_the_same(
        self, base: Any, preparations: list[int], tmp_path: Path
    ) -> None:
        alone = self.made(base, None)
        first, second = self.made(base, tmp_path), self.made(base, tmp_path)
        assert len(preparations) == 2
        for found in (first, second):
            assert found.train.to_dict() == alone.train.to_dict()
            assert found.validation.to_dict() == alone.validation.to_dict()
            assert found.unlearnable == alone.unlearnable and found.test is None

    @pytest.mark.parametrize(
        "changed",
        [
            {"rows": [*ROWS, {"prompt": "1+3=", "completion": "4"}]},
            {"max_length": 5},
            {"extra": {"completion_only_loss": False}},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_what_decides_the_tokens_makes_them_anew(
        self, base: Any, preparations: list[int], tmp_path: Path, changed: dict[str, Any]
    ) -> None:
        self.made(base, tmp_path)
        found = self.made(base, tmp_path, **changed)
        assert len(preparations) == 2
        assert found.train.to_dict() == self.made(base, None, **changed).train.to_dict()

    def test_another_model_makes_them_anew(
        self, base: Any, preparations: list[int], tmp_path: Path
    ) -> None:
        self.made(base, tmp_path)
        self.made(replace(base, fingerprint="another"), tmp_path)
        assert len(preparations) == 2

    def test_another_split_or_template_makes_them_anew(
        self, base: Any, preparations: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [{"messages": TURNS}]
        splits = Splits("messages", rows, rows, None)
        options: dict[str, Any] = {"max_length": 16, "use_cpu": True, "cache": tmp_path}
        before = tokenise(splits, base, TrainingOptions(), **options)
        tokenise(replace(splits, validation=rows * 2), base, TrainingOptions(), **options)
        tokenise(replace(splits, test=rows), base, TrainingOptions(), **options)
        monkeypatch.setattr(base.tokenizer, "chat_template", ">" + base.tokenizer.chat_template)
        after = tokenise(splits, base, TrainingOptions(), **options)
        assert len(preparations) == 4
        assert after.lengths == [length + 1 for length in before.lengths]

    def test_other_versions_make_them_anew(
        self, base: Any, preparations: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for changed in (None, "datasets", "tokenizers", "transformers", "trl"):
            monkeypatch.setattr(tokens, "version", lambda name, new=changed: str(name == new))
            self.made(base, tmp_path)
        assert len(preparations) == 5

    def test_what_changes_the_tokenizer_is_never_taken_from_disk(
        self, base: Any, preparations: list[int], tmp_path: Path
    ) -> None:
        for _ in range(2):
            own = replace(base, tokenizer=deepcopy(base.tokenizer))
            self.made(own, tmp_path, extra={"eos_token": "9"})
            assert own.tokenizer.eos_token == "9"
        assert len(preparations) == 2
        assert not list(tmp_path.iterdir())

    def test_a_damaged_entry_is_made_again(
        self, base: Any, preparations: list[int], tmp_path: Path
    ) -> None:
        whole = self.made(base, tmp_path).train.to_dict()
        (entry,) = (tmp_path / "tokens").iterdir()
        next(iter(entry.glob("train/*.arrow"))).write_bytes(b"half")
        assert self.made(base, tmp_path).train.to_dict() == whole
        assert self.made(base, tmp_path).train.to_dict() == whole
        assert len(preparations) == 2
        assert [path.name for path in (tmp_path / "tokens").iterdir()] == [entry.name]

    def test_a_folder_that_cannot_be_written_is_one_sentence(
        self, base: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "tokens").write_text("in the way")
        with pytest.raises(UserError, match=r"the cache folder .*tokens' cannot be written"):
            self.made(base, tmp_path)


class TestNoEnd:
    """A tokenizer without an end-of-sequence token."""

    @pytest.fixture
    def endless(self, base: Any) -> Any:
        tokenizer = deepcopy(base.tokenizer)
        tokenizer.eos_token = None
        return replace(base, tokenizer=tokenizer)

    @pytest.mark.parametrize("row", [{"text": "ab"}, {"prompt": "a", "completion": "b"}])
    def test_text_is_refused_in_a_sentence(self, endless: Any, row: dict[str, str]) -> None:
        kind: Kind = "text" if "text" in row else "prompt-completion"
        with pytest.raises(UserError) as refused:
            made(endless, kind, [row])
        assert "has no end-of-sequence token to end the examples with" in str(refused.value)
        assert "training.extra.eos_token" in str(refused.value)

    def test_text_ends_with_the_token_that_was_named(self, endless: Any) -> None:
        tokens = made(endless, "text", [{"text": "ab"}], eos_token="9")
        assert learnt(endless, tokens) == ["ab9"]

    def test_chats_end_as_their_template_says(self, endless: Any) -> None:
        tokens = made(endless, "messages", [{"messages": TURNS}])
        assert learnt(endless, tokens) == ["u>2?\na>yes\n"]


def test_the_text_of_special_tokens_is_counted(base: Any) -> None:
    rows = [{"text": "a</s>b"}, {"text": "plain"}, {"text": "<pad>"}]
    assert made(base, "text", rows).special == {"train": 2, "validation": 2}
    chats = [{"messages": [{"role": "user", "content": "</s>"}, TURNS[1]]}, {"messages": TURNS}]
    assert made(base, "messages", chats).special == {"train": 1, "validation": 1}


def test_what_was_cut_is_counted(base: Any) -> None:
    rows = [{"text": "1234"}, {"text": "12345"}, {"text": "123456"}]
    tokens = made(base, "text", rows, max_length=6)
    assert tokens.cut == {"train": 1, "validation": 1}
    assert [len(ids) for ids in tokens.train["input_ids"]] == [5, 6, 6]
