"""Where layers stand in a model: the block, and which of its modules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from optuna_lora_rl.errors import UserError

# So many layers are shown one by one.
FEW = 64
# Into so many ranges blocks are divided where there are more layers than that.
_RANGES = 3
_BLOCK = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        block: Number of its block; None outside the blocks.
        module: What it is there, such as ``q_proj``; as much of the path as tells it from the
            other modules.
    """

    block: int | None
    module: str


@dataclass(frozen=True)
class Group:
    """Layers of one kind in neighbouring blocks.

    Attributes:
        module: The kind, as of a :class:`Place`.
        blocks: The range of blocks in words, such as ``0-9``.
        names: The layers.
    """

    module: str
    blocks: str
    names: tuple[str, ...]


def groups(names: Iterable[str]) -> list[Group]:
    """Divides layers by kind and range of blocks: the first third, the middle and the last."""
    where = of_names(names)
    blocks = sorted({place.block for place in where.values() if place.block is not None})
    ranges: dict[int | None, int] = {
        block: number * _RANGES // len(blocks) for number, block in enumerate(blocks)
    }
    found: dict[str, dict[int, list[str]]] = {}
    for name in in_order(where):
        place = where[name]
        found.setdefault(place.module, defaultdict(list))[ranges.get(place.block, -1)].append(name)
    return [
        Group(module, span(where[group[0]].block, where[group[-1]].block), tuple(group))
        for module, by_range in found.items()
        for group in by_range.values()
    ]


def in_words(names: Iterable[str]) -> str:
    """Returns layers by kind and block, such as ``q_proj of blocks 0-3 and 7, lm_head``."""
    kinds: dict[str, list[int]] = {}
    for place in of_names(in_order(names)).values():
        kinds.setdefault(place.module, []).extend([] if place.block is None else [place.block])
    return ", ".join(f"{kind}{_of_blocks(blocks)}" for kind, blocks in kinds.items())


def span(first: int | None, last: int | None) -> str:
    """Returns a range of blocks in words."""
    if first is None or last is None:
        return "none"
    return str(first) if first == last else f"{first}-{last}"


def of_names(names: Iterable[str]) -> dict[str, Place]:
    """Places layers; no two stand at the same place."""
    known = list(names)
    split = {name: _split(name) for name in known}
    found: dict[str, Place] = {}
    for spell in _SPELLINGS:
        found = {name: Place(split[name][1], spell(*split[name])) for name in known}
        kinds = {(place.module, split[name][0], split[name][2]) for name, place in found.items()}
        # One word for one kind of module, whichever block it is in.
        if len({module for module, _, _ in kinds}) == len(kinds):
            break
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Returns layers block by block, those outside the blocks first."""

    def block(name: str) -> int:
        number = _split(name)[1]
        return -1 if number is None else number

    return sorted(names, key=block)


def chosen(names: Iterable[str], modules: Iterable[str] | None) -> list[str]:
    """Returns the layers whose path ends with one of ``modules``, all if None.

    Raises:
        UserError: When one of them ends no layer's path.
    """
    known = list(names)
    if modules is None:
        return known
    wanted = set()
    for module in modules:
        matched = [name for name in known if _ends(name, module)]
        if not matched:
            there = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(f"there is no module {module!r}; the modules are {', '.join(there)}")
        wanted.update(matched)
    return [name for name in known if name in wanted]


def targets(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """Returns ``LoraConfig.target_modules`` that reach ``names`` and no other of ``every``."""
    wanted = list(names)
    short = {name: name.rpartition(".")[2] for name in wanted}
    others = set(every) - set(wanted)
    clear = {word for word in short.values() if not any(_ends(one, word) for one in others)}
    return list(dict.fromkeys(short[n] if short[n] in clear else n for n in wanted))


def collapsed(values: Mapping[str, T], usual: T) -> dict[str, T]:
    """Returns a ``LoraConfig``'s pattern, as short as it can be.

    Args:
        values: The value of each layer.
        usual: What layers have that the pattern does not name.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, place in of_names(values).items():
        groups[place.module].append(name)
    found: dict[str, T] = {}
    for module, group in groups.items():
        same = len({values[name] for name in group}) == 1
        if same and not any(_ends(name, module) for name in values if name not in group):
            found[re.escape(module)] = values[group[0]]
            continue
        for value in dict.fromkeys(values[name] for name in group):
            found[_key([name for name in group if values[name] == value])] = value
    return {key: value for key, value in found.items() if value != usual}


def _of_blocks(blocks: list[int]) -> str:
    if not blocks:
        return ""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and block == spans[-1][1] + 1:
            spans[-1][1] = block
        else:
            spans.append([block, block])
    words = [span(first, last) for first, last in spans]
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f" of block{'s' if len(blocks) > 1 else ''} {listed}"


def _key(names: list[str]) -> str:
    """The regular expression of one kind of module in several blocks."""
    # It takes torch, which those who only place layers need not wait for.
    from optuna_lora_rl.rank import layers

    if len(names) == 1:
        return layers.exactly(names[0])
    before, _, rest = _split(names[0])
    numbers = "|".join(str(_split(name)[1]) for name in names)
    start = re.escape(before) + r"\." if before else ""
    return rf"^{start}({numbers})\.{re.escape(rest)}"


def _split(name: str) -> tuple[str, int | None, str]:
    match = _BLOCK.match(name)
    return (match[1] or "", int(match[2]), match[3]) if match else ("", None, name)


_SPELLINGS: tuple[Callable[[str, int | None, str], str], ...] = (
    lambda before, block, rest: rest.rpartition(".")[2],
    lambda before, block, rest: rest,
    lambda before, block, rest: f"{before}.{rest}" if before else rest,
)


def _ends(name: str, module: str) -> bool:
    return name == module or name.endswith("." + module)
