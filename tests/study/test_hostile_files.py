"""Files that were made to harm, or named by mistake: one short sentence, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from optuna_lora_rl import cli
from optuna_lora_rl import errors

_ALIASES = "a0: &a0 [lol, lol, lol]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
)
_MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 12)
)
_CHAIN = "a0: &a0 [1]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}]\n" for k in range(1, 2000))

# What a study's file may hold, and what has to be said of it.
FILES: dict[str, tuple[bytes, str]] = {
    "a bad date": (b"budget: 2024-13-45\n", "budget.trials is '2024-13-45', but must be a whole"),
    "a bad time": (b"budget: 2024-01-01T25:61:61Z\n", "budget.trials is '2024-01-01T25:61:61Z'"),
    "a good date": (b"budget: 2024-01-01\n", "budget.trials is '2024-01-01', but must be a whole"),
    "an explicit date": (b"budget: !!timestamp x\n", "line 1: the tag 'tag:yaml.org,2002:times"),
    "a number of 5,000 digits": (
        b"budget: " + b"9" * 5000,
        "line 1: a number of 5,000 characters is too long",
    ),
    "a hexadecimal number of 5,000 digits": (
        b"budget: 0x" + b"f" * 5000,
        "line 1: a number of 5,002 characters is too long",
    ),
    "minutes upon minutes": (b"budget: 1" + b":59" * 9000, "characters is too long"),
    "a number beyond 64 bits": (b"budget: 9223372036854775808", "line 1: the number '92233720"),
    "no digits": (b"budget: 0b_\n", "line 1: '0b_' is no int"),
    "nested lists": (b"space: " + b"[" * 5000, "line 1: values are nested more than 40 deep"),
    "nested lists that end": (b"space: " + b"[" * 5000 + b"]" * 5000, "more than 40 deep"),
    "nested mappings": (b"space: " + b"{a: " * 5000, "line 1: values are nested more than 40"),
    "nested blocks": (
        "".join(f"{' ' * k}a:\n" for k in range(500)).encode(),
        "line 40: values are nested more than 40 deep",
    ),
    "nested keys": (b"? " * 3000, "more than 40 deep"),
    "aliases of aliases": (_ALIASES.encode(), "the file holds more than 20,000 values"),
    "merges of merges": (_MERGED.encode(), "the file holds more than 20,000 values"),
    "a chain of aliases": (_CHAIN.encode(), "values are nested more than 40 deep"),
    "an alias within itself": (b"space: &a [*a]\n", "line 1: an alias (*) stands within what it"),
    "a mapping within itself": (b"space: &a {x: *a}\n", "line 1: an alias (*) stands within what"),
    "a NUL": (b"model: tiny\x00\n", "this is not valid YAML (it holds '\\x00')"),
    "an escaped NUL": (b'name: "a\\0b"\n', "line 1: a text holds the character '\\x00'"),
    "an escape sequence": (b'name: "\\e[31mred"\n', "line 1: a text holds the character '\\x1b'"),
    "half a character": (b'name: "\\ud800"\n', "line 1: a text holds the character '\\ud800'"),
    "another encoding": ("name: größe\n".encode("latin-1"), "is not a text file in UTF-8"),
    "two bytes a character": ("name: x\n".encode("utf-16"), "is not a text file in UTF-8"),
    "binary": (bytes(range(256)) * 20, "is not a text file in UTF-8"),
    "a tag for Python": (b"name: !!python/object/apply:os.system [ls]\n", "could not determine a"),
    "bytes": (b"name: !!binary aGVsbG8=\n", "line 1: the tag 'tag:yaml.org,2002:binary' is not"),
    "a truth that is none": (b"model: {trust_remote_code: !!bool maybe}\n", "'maybe' is no bool"),
    "a set": (b"space: !!set {a, b}\n", "small.yaml"),
    "two documents": (b"name: a\n---\nname: b\n", "expected a single document"),
    "a key of brackets": (b"'[[[x': 1\ndata: x\n", "[[[x is not a known key; known are"),
    "a key that is a type": (b"int: 1\ndata: x\n", "small.yaml: int is not a known key"),
    "an unknown key in a list": (
        b"data: x\ntransfer_from: [{studdy: x}]\n",
        "transfer_from.0.studdy is not a known key; did you mean study?",
    ),
    "a list as a key": (b"? [a, b]\n: c\n", "line 1: ['a', 'b'] is not a key name"),
    "a key given twice": (b"model: tiny\n" * 2, "line 2: the key model is given twice"),
    "a long text": (b"budget: " + b"x" * 200_000, "budget.trials is 'xxx"),
    "a long key": (b"x" * 1000 + b": 1\n", "small.yaml"),
    "300 kB": (b"# comment\n" * 30_000, "small.yaml is larger than 256 KiB"),
    "10 MB of text": (b"name: " + b"x" * 10_000_000, "small.yaml is larger than 256 KiB"),
    "10 MB of brackets": (b"[" * 10_000_000, "small.yaml is larger than 256 KiB"),
    "10 MB of rows": (b'{"prompt": "a", "completion": "b"}\n' * 290_000, "larger than 256 KiB"),
    "10 MB of zeros": (bytes(10_000_000), "small.yaml is larger than 256 KiB"),
    "as many values as fit": (b"space: [" + b"1," * 120_000 + b"1]", "more than 20,000 values"),
    "as many keys as fit": (
        "".join(f"k{k}: 1\n" for k in range(20_000)).encode(),
        "the file holds more than 20,000 values",
    ),
    "as many mistakes as fit": (
        "".join(f"k{k}: 1\n" for k in range(9000)).encode(),
        "small.yaml has 9001 mistakes",
    ),
    "as many quotes as fit": (b'a: "' + b'\\"' * 120_000 + b'"', "small.yaml"),
    "as many lines as fit": (b"a: |\n" + b" x\n" * 80_000, "small.yaml"),
}


def said_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    began = time.process_time()
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: "), said
    assert len(said) <= len("error: ") + errors.MOST_SAID + 1
    assert time.process_time() - began < 5
    return said


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_one_short_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, sentence = FILES[case]
    Path("small.yaml").write_bytes(content)
    assert sentence in said_of(["validate", "small.yaml"], capsys)


@pytest.mark.parametrize("command", ["compare", "train-policy"])
@pytest.mark.parametrize("case", ["nested lists", "aliases of aliases", "10 MB of text"])
def test_so_it_is_where_other_files_are_read(
    command: str,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content, sentence = FILES[case]
    Path("small.yaml").write_bytes(content)
    assert sentence in said_of([command, "small.yaml", "--output", "out"], capsys)


@pytest.mark.parametrize(
    "value", ["[" * 5000, "9" * 5000, "2024-13-45", "&a [*a]", "x" * 100_000, '"\\0"', "!!set {a}"]
)
def test_so_it_is_on_the_command_line(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("data: tiny:dates-small\n", encoding="utf-8")
    said_of(["validate", "small.yaml", "--set", f"budget.trials={value}"], capsys)
    said_of(["validate", "small.yaml", "--set", f"{value}=1"], capsys)


def test_a_file_may_begin_with_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("\ufeffdata: tiny:dates-small\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", "small.yaml"])
    assert ended.value.code == 0


def test_aliases_and_merges_as_people_use_them_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna_lora_rl.study import spec

    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(
        "data: {train: tiny:dates-small}\n"
        "target_sets: {mine: &mine [q_proj, v_proj], other: *mine}\n"
        "budget: &budget {trials: 5}\n"
        "objective: {cost: {<<: &cost {time: 2}, memory: 1}}\n",
        encoding="utf-8",
    )
    read = spec.load("small.yaml")
    assert read.target_sets["other"] == ["q_proj", "v_proj"]
    assert (read.objective.cost.time, read.objective.cost.memory) == (2, 1)


@pytest.mark.parametrize("said", ["[" * 100_000, "9" * 5000, '{"trial": ' + "9" * 5000 + "}"])
def test_a_hostile_result_that_is_told_is_one_short_sentence(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("data: tiny:dates-small\n", encoding="utf-8")
    assert "the result" in said_of(["tell", "small.yaml", said], capsys)
