"""Examples as token sequences: made once, by TRL's own preparation, and used by every trial."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Features
from datasets import IterableDataset
from datasets import List
from datasets import Value
from datasets import concatenate_datasets
from datasets.utils import tqdm
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig
from trl import SFTTrainer
from trl import pack_dataset

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning.cache import kept
from optuna_lora_rl.finetuning.data import Splits
from optuna_lora_rl.finetuning.data import fingerprint
from optuna_lora_rl.finetuning.data import turns
from optuna_lora_rl.finetuning.files import Row
from optuna_lora_rl.finetuning.lora import restored
from optuna_lora_rl.finetuning.model import Base
from optuna_lora_rl.finetuning.options import TrainingOptions

# Of TRL's columns: what runs read. Beside them stands how long an example was before it was cut.
_COLUMNS = ("input_ids", "labels", "seq_lengths")
_WHOLE = "whole_length"
# Another number where other tokens are made of the same rows.
_PREPARATION = 2
_BATCH = 1000
_FEATURES = Features(
    {"input_ids": List(Value("int64")), "labels": List(Value("int64")), _WHOLE: Value("int64")}
)
# What decides how rows become tokens.
_LIBRARIES = ("datasets", "tokenizers", "transformers", "trl")
# Of TRL's arguments: what changes the tokenizer too, which only preparing does.
_CHANGES_TOKENIZER = ("chat_template_path", "eos_token")


@dataclass(frozen=True)
class Tokens:
    """The tokenised splits.

    Attributes:
        train: Columns ``input_ids`` and ``labels`` (-100 where nothing is to be learnt).
        validation: The same, for evaluations; the shortest first.
        test: The same, for the final best, or None.
        emptied: By split, how many examples were left out because cutting them to the longest
            length left nothing to learn.
        cut: By split, how many of the others were cut.
        max_length: The longest length.
        special: By split, how many examples hold the text of a special token, which becomes that
            token.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    emptied: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    special: Mapping[str, int] = field(default_factory=dict)
    max_length: int | None = None

    @property
    def unlearnable(self) -> int:
        """How many examples were left out because nothing of them was left to learn."""
        return sum(self.emptied.values())

    @property
    def lengths(self) -> list[int]:
        """Lengths of the training sequences, in tokens."""
        return [len(ids) for ids in self.train["input_ids"]]


def tokenise(
    splits: Splits,
    base: Base,
    training: TrainingOptions,
    *,
    max_length: int,
    use_cpu: bool,
    cache: Path | None = None,
) -> Tokens:
    """Tokenises and cuts all splits.

    Prompt/completion examples are learnt in their completion only, others in every token, as TRL
    does; ``training.extra`` may say otherwise.

    Args:
        splits: The examples.
        base: Whose tokenizer it is.
        training: How every run trains.
        max_length: Longest sequence, in tokens.
        use_cpu: Whether runs are on the CPU.
        cache: Folder where tokens are kept by the content of the examples and all that decides
            what becomes of them; without it they are made in each process.

    Raises:
        UserError: When the tokenizer cannot render chat messages, nothing is left to learn, or
            the cache cannot be written.
    """
    datasets = {"train": splits.train, "validation": splits.validation}
    if splits.test:
        datasets["test"] = splits.test
    _check_end(datasets, base, training)
    _check_templates(datasets, base)
    facts = {
        "rows": {name: fingerprint(rows) for name, rows in datasets.items()},
        "model": base.fingerprint,
        "chat_template": base.tokenizer.chat_template,
        "max_length": max_length,
        "packing": training.packing,
        "preparation": _PREPARATION,
        "extra": _preparation(training.extra),
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    if any(name in training.extra for name in _CHANGES_TOKENIZER):
        cache = None

    def make() -> dict[str, Dataset]:
        try:
            return _prepare(datasets, base, training, max_length, use_cpu)
        except (TemplateError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(
                f"data.train: the {splits.kind} examples cannot be tokenised with the tokenizer "
                f"of {base.name!r}{_culprit(datasets, base.tokenizer)}: {first_line(error)}"
            ) from error

    prepared = kept(None if cache is None else cache / "tokens", facts, make)
    for name, dataset in prepared.items():
        if not len(dataset):
            raise UserError(
                f"data.max_length: within {max_length} tokens no {name} example has anything "
                "left to learn; the prompts alone fill it"
            )
    learnt = {
        name: dataset for name, dataset in prepared.items() if _WHOLE in dataset.column_names
    }
    return Tokens(
        train=_columns(prepared["train"]),
        validation=_by_length(prepared["validation"]),
        test=_by_length(prepared["test"]) if "test" in prepared else None,
        emptied={name: len(datasets[name]) - len(dataset) for name, dataset in learnt.items()},
        cut={
            name: sum(length > max_length for length in dataset[_WHOLE][:])
            for name, dataset in learnt.items()
        },
        special={name: _with_special(rows, base.tokenizer) for name, rows in datasets.items()},
        max_length=max_length,
    )


def _prepare(
    datasets: dict[str, list[Row]],
    base: Base,
    training: TrainingOptions,
    max_length: int,
    use_cpu: bool,
) -> dict[str, Dataset]:
    # Cut and packed below: TRL does not say what it cut.
    settings: dict[str, Any] = {
        "output_dir": "runs",
        "use_cpu": use_cpu,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": None,
        "max_steps": 1,
        **_preparation(training.extra),
    }
    rows = {name: _source(split) for name, split in datasets.items()}
    train = rows.pop("train")
    with restored(base.model, {}):
        trainer = SFTTrainer(
            model=base.model,
            args=SFTConfig(**settings),
            train_dataset=train,
            eval_dataset=rows,
            processing_class=base.tokenizer,
        )
        mode, strategy = trainer.args.truncation_mode, trainer.args.packing_strategy
        prepared = {"train": trainer.train_dataset, **trainer.eval_dataset}
        made = {}
        for name, dataset in prepared.items():
            packs = training.packing and name == "train"
            # TRL works when it is asked for a row.
            shown = tqdm(
                dataset,
                total=len(datasets[name]),
                desc=f"Tokenising {name}",
                unit=" examples",
            )
            made[name] = _table(_cut(shown, None if packs else max_length, mode))
            if packs:
                whole = made[name].select_columns(_COLUMNS[:2])
                made[name] = pack_dataset(whole, max_length, strategy)
    return made


def _source(rows: list[Row]) -> Dataset | IterableDataset:
    if not any(map(turns, rows)):
        return Dataset.from_list(rows)
    # As JSON until each is read: a table would give every structure the fields of all others.
    table = Dataset.from_dict({"row": [json.dumps(row) for row in rows]})
    return table.to_iterable_dataset().map(
        lambda line: json.loads(line["row"]), remove_columns="row"
    )


def _cut(rows: Iterable[Row], max_length: int | None, mode: str) -> Iterator[Row]:
    """Cuts sequences as TRL does, and leaves out what has nothing left to learn."""
    kept = slice(None, max_length)
    if max_length is not None and mode == "keep_end":
        kept = slice(-max_length, None)
    for row in rows:
        ids, labels = row["input_ids"][kept], row["labels"][kept]
        if any(label != -100 for label in labels):
            yield {"input_ids": ids, "labels": labels, _WHOLE: len(row["input_ids"])}


def _table(rows: Iterator[Row]) -> Dataset:
    empty: Row = {"input_ids": [], "labels": [], _WHOLE: []}
    parts = [Dataset.from_dict(empty, features=_FEATURES)]
    while batch := list(islice(rows, _BATCH)):
        parts.append(Dataset.from_list(batch, features=_FEATURES))
    return concatenate_datasets(parts)


def _check_end(datasets: dict[str, list[Row]], base: Base, training: TrainingOptions) -> None:
    is_chat = any(map(turns, datasets["train"]))
    if base.tokenizer.eos_token is None and "eos_token" not in training.extra and not is_chat:
        raise UserError(
            f"model.name: the tokenizer of {base.name!r} has no end-of-sequence token to end the "
            "examples with; name one of its tokens in training.extra.eos_token"
        )


def _check_templates(datasets: dict[str, list[Row]], base: Base) -> None:
    """Refuses chats of which the template leaves turns out, as it does of roles it has not."""
    template = base.tokenizer.chat_template
    if template is None:
        return
    seen: set[str] = set()
    for row in (row for split in datasets.values() for row in split):
        for turn in turns(row):
            role = f"{turn['role']} that calls tools" if turn.get("tool_calls") else turn["role"]
            if role not in seen:
                seen.add(role)
                _check_said(row, turn, role, base)


def _check_said(row: Row, turn: Row, role: str, base: Base) -> None:
    mark = "Xyzzy"
    marked = {**turn, "content": mark}
    if turn.get("tool_calls"):
        marked = {**turn, "tool_calls": [_called(turn["tool_calls"][0], mark)]}
    said = [marked if other is turn else other for other in turns(row)]
    try:
        text = _rendered(base.tokenizer, said, row.get("tools"))
    except Exception:
        # What it refuses altogether is told when the examples are tokenised.
        return
    if mark not in text:
        raise UserError(
            f"data.train: the chat template of {base.name!r} leaves out messages of the role "
            f"{role}, at the example that begins with {_opening(row)!r}; such chats would be "
            "learnt without them"
        )


def _called(call: Any, name: str) -> Any:
    # With or without OpenAI's envelope.
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _called(call["function"], name)}
    return {**call, "name": name} if isinstance(call, dict) else call


def _with_special(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> int:
    special = {
        *tokenizer.all_special_tokens,
        *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special),
    }
    if not special:
        return 0
    found = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    return sum(any(map(found.search, _texts(row))) for row in rows)


def _texts(row: Row) -> list[str]:
    said = turns(row)
    if said:
        return [turn["content"] for turn in said]
    return [value for value in row.values() if isinstance(value, str)]


def _culprit(datasets: dict[str, list[Row]], tokenizer: PreTrainedTokenizerBase) -> str:
    # TRL says what a chat template refused, but not where.
    if tokenizer.chat_template is None:
        return ""
    for row in (row for split in datasets.values() for row in split if turns(row)):
        try:
            _rendered(tokenizer, turns(row), row.get("tools"))
        except Exception:
            return f", at the example that begins with {_opening(row)!r}"
    return ""


def _rendered(tokenizer: PreTrainedTokenizerBase, said: list[Row], tools: str | None) -> str:
    known = None if tools is None else json.loads(tools)
    return str(tokenizer.apply_chat_template(said, tools=known, tokenize=False))


def _opening(row: Row) -> str:
    return " ".join(str(turns(row)[0]["content"]).split())[:60]


def _preparation(extra: dict[str, Any]) -> dict[str, Any]:
    names = (
        "assistant_only_loss",
        "chat_template_path",
        "completion_only_loss",
        "dataset_num_proc",
        "eos_token",
        "packing_strategy",
        "truncation_mode",
    )
    return {name: value for name, value in extra.items() if name in names}


def _by_length(dataset: Dataset) -> Dataset:
    """The columns that are read, like lengths together: less padding, and the same metrics."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return _columns(dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__)))


def _columns(dataset: Dataset) -> Dataset:
    kept: Sequence[str] = [name for name in _COLUMNS if name in dataset.column_names]
    return dataset.select_columns(list(kept))
