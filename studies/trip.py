"""The files of the package that one trial of the quickstart passes, and those of its proposal.

    python studies/trip.py

Follows the calls of a study's third trial, from where it is asked for to where it is told. A
file counts once, however often it is entered; an arrow is a pair of files, one calling the other.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import optuna_lora_rl
from optuna_lora_rl.samplers.rl import RLSampler
from optuna_lora_rl.study import runner
from optuna_lora_rl.study.spec import load
from optuna_lora_rl.study.trials import Trials

STUDY = Path(__file__).with_name("quickstart.yaml")
PACKAGE = str(Path(optuna_lora_rl.__file__).parent) + "/"
# The first trials load, tokenise and measure what all others take from them.
NUMBER = 2


class Trip:
    """What is passed while it is open.

    Attributes:
        files: Files of the package, in the order of their first call.
        arrows: Pairs of files, caller and called.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.arrows: set[tuple[str, str]] = set()

    def enters(self, frame: FrameType) -> None:
        """Takes a call; those of other packages are left out, and what they call back is not."""
        called = _own(frame)
        if called is None:
            return
        self.files.setdefault(called)
        caller = frame.f_back
        while caller is not None and _own(caller) is None:
            caller = caller.f_back
        if caller is not None and (source := _own(caller)) is not None and source != called:
            self.arrows.add((source, called))


def _own(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    return name.removeprefix(PACKAGE) if name.startswith(PACKAGE) else None


@contextmanager
def followed(trial: Trip, proposal: Trip) -> Iterator[None]:
    """Fills both trips from the study that is run in the block."""
    depth = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            trial.enters(frame)
            if depth:
                proposal.enters(frame)

    ask, tell = Trials.next, Trials.done
    asked = 0

    def asks(trials: Trials) -> Any:
        nonlocal asked
        if asked == NUMBER:
            sys.setprofile(profile)
        asked += 1
        return ask(trials)

    def tells(trials: Trials, *args: Any) -> None:
        try:
            tell(trials, *args)
        finally:
            sys.setprofile(None)

    def proposes(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1

        return wrapped

    names = ("infer_relative_search_space", "sample_relative", "sample_independent")
    before = {name: getattr(RLSampler, name) for name in names}
    Trials.next, Trials.done = asks, tells  # type: ignore[method-assign]
    for name, method in before.items():
        setattr(RLSampler, name, proposes(method))
    try:
        yield
    finally:
        sys.setprofile(None)
        Trials.next, Trials.done = ask, tell  # type: ignore[method-assign]
        for name, method in before.items():
            setattr(RLSampler, name, method)


def main() -> None:
    """Runs the study as far as its third trial, and prints both trips."""
    trial, proposal = Trip(), Trip()
    with tempfile.TemporaryDirectory() as folder, followed(trial, proposal):
        runner.run(load(STUDY, [f"output={folder}/out", f"budget.trials={NUMBER + 1}"]))
    for name, trip in (("a trial", trial), ("its proposal", proposal)):
        print(f"{name}: {len(trip.files)} files, {len(trip.arrows)} arrows")
        print("".join(f"    {file}\n" for file in trip.files))


if __name__ == "__main__":
    main()
