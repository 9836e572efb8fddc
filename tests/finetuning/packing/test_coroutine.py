"""Functions that wait in the middle."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

import optuna_lora_rl.finetuning.packing.coroutine as coroutine_module
from optuna_lora_rl.finetuning.packing.coroutine import Abandoned
from optuna_lora_rl.finetuning.packing.coroutine import Coroutine
from optuna_lora_rl.finetuning.packing.coroutine import Globals


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Threads and global state are as they were, whatever a test does."""
    threads, before = threading.enumerate(), numbers()
    yield
    assert threading.enumerate() == threads
    assert numbers() == before


def numbers() -> tuple[Any, ...]:
    state = Globals.current()
    return state.python, str(state.numpy), state.cpu.tolist(), state.gradients


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def made(function: Callable[[Coroutine[Any]], Any]) -> Coroutine[Any]:
    """A coroutine whose function can ask."""
    coroutine: Coroutine[Any] = Coroutine(lambda: function(coroutine))
    return coroutine


def test_requests_are_answered_and_the_result_is_kept() -> None:
    coroutine = made(lambda own: [own.ask("first"), own.ask("second")])
    assert coroutine.request is None and not coroutine.ended
    coroutine.resume()
    assert coroutine.request == "first"
    coroutine.resume(1)
    assert coroutine.request == "second" and not coroutine.ended
    coroutine.resume(2)
    assert coroutine.ended and coroutine.request is None
    assert coroutine.result == [1, 2] and coroutine.error is None


def test_an_error_instead_of_an_answer_is_raised_where_it_was_asked() -> None:
    def function(own: Coroutine[Any]) -> str:
        try:
            own.ask("please")
        except KeyError as error:
            own.ask(f"refused: {error}")
        return "went on"

    coroutine = made(function)
    coroutine.resume()
    coroutine.resume(error=KeyError("no"))
    assert coroutine.request == "refused: 'no'"
    coroutine.resume()
    assert coroutine.result == "went on" and coroutine.error is None


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_what_it_raises_is_kept_for_the_caller(error: BaseException) -> None:
    def function(own: Coroutine[Any]) -> None:
        own.ask("first")
        raise error

    coroutine = made(function)
    coroutine.resume()
    coroutine.resume()
    assert coroutine.ended and coroutine.error is error and coroutine.result is None


def test_one_that_is_abandoned_clears_up_and_ends() -> None:
    cleared: list[str] = []

    def function(own: Coroutine[Any]) -> None:
        try:
            own.ask("first")
            cleared.append("went on")
        except Exception:
            cleared.append("swallowed")
        finally:
            cleared.append("finally")

    coroutine = made(function)
    coroutine.resume()
    coroutine.abandon()
    assert cleared == ["finally"]
    assert coroutine.ended and isinstance(coroutine.error, Abandoned)
    coroutine.abandon()
    assert cleared == ["finally"]


def test_one_that_never_began_is_abandoned_without_beginning() -> None:
    began: list[bool] = []
    coroutine = made(lambda own: began.append(True))
    coroutine.abandon()
    assert coroutine.ended and began == []


def test_each_draws_random_numbers_as_if_it_were_alone() -> None:
    def function(own: Coroutine[Any], number: int) -> list[tuple[float, float, float]]:
        seed(number)
        drawn = []
        for _ in range(4):
            drawn.append(draw())
            own.ask("next")
        return drawn

    expected = []
    before = Globals.current()
    for number in range(3):
        seed(number)
        expected.append([draw() for _ in range(4)])
    before.install()
    several = [made(lambda own, number=number: function(own, number)) for number in range(3)]
    # Not in turn, and with draws of the caller's own in between.
    order = random.Random(0)
    while waiting := [coroutine for coroutine in several if not coroutine.ended]:
        order.choice(waiting).resume()
        draw()
    assert [coroutine.result for coroutine in several] == expected
    before.install()


def test_the_callers_random_numbers_are_left_alone() -> None:
    coroutine = made(lambda own: [seed(5), own.ask("next"), draw()])
    before = numbers()
    coroutine.resume()
    assert numbers() == before
    coroutine.resume()
    assert numbers() == before
    # They began where the caller's stood.
    like = made(lambda own: draw())
    like.resume()
    saved = Globals.current()
    assert like.result == draw()
    saved.install()


def test_what_accelerate_knows_of_the_step_is_each_ones_own() -> None:
    def function(own: Coroutine[Any], sync: bool) -> list[bool]:
        state = GradientState()
        found = []
        for _ in range(3):
            state._set_sync_gradients(sync)
            own.ask("next")
            found.append(GradientState().sync_gradients)
            sync = not sync
        return found

    several = [made(lambda own, sync=sync: function(own, sync)) for sync in (True, False)]
    for _ in range(4):
        for coroutine in several:
            coroutine.resume()
    assert [coroutine.result for coroutine in several] == [
        [True, False, True],
        [False, True, False],
    ]


def test_a_generator_goes_on_where_the_global_one_stood() -> None:
    saved = Globals.current()
    generator = saved.generator(torch.device("cpu"))
    found = torch.rand(3, generator=generator)
    torch.testing.assert_close(found, torch.rand(3), rtol=0, atol=0)
    # And the global one goes on where the generator stands.
    saved.drawn(generator).install()
    following = torch.rand(3)
    torch.testing.assert_close(following, torch.rand(3, generator=generator), rtol=0, atol=0)
    saved.install()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_waits_until_the_function_comes_to_a_request() -> None:
    main = threading.main_thread().ident
    reached: list[str] = []
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def function(own: Coroutine[Any]) -> None:
        assert main is not None
        # Until the caller waits: what measures coverage, interrupted, would keep its lock.
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)
        while not seen:
            time.sleep(0.001)
        reached.append("request")
        own.ask("first")

    coroutine = made(function)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            coroutine.resume()
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == ["request"] and coroutine.request == "first"
    coroutine.abandon()
    assert coroutine.ended


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_interrupts_at_any_moment_neither_block_nor_are_lost() -> None:
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Only in the coroutine's own code: what measures coverage, or prints what a destructor
        # raised, would keep its lock for ever.
        if armed and frame is not None and frame.f_code.co_filename == coroutine_module.__file__:
            seen.append(number)
            raise KeyboardInterrupt

    def function(own: Coroutine[Any]) -> None:
        while True:
            own.ask("next")

    armed = False
    before = Globals.current()
    own_handler = signal.signal(signal.SIGALRM, interrupt)
    coroutine, raised = made(function), 0
    coroutine.resume()
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
    try:
        for _ in range(300):
            try:
                armed = True
                coroutine.resume()
                armed = False
            except KeyboardInterrupt:
                armed = False
                raised += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own_handler)
    assert 0 < raised <= len(seen)
    coroutine.abandon()
    # An interrupt may fall into the hand-over of the globals itself: the caller puts them back.
    before.install()
    assert coroutine.ended
