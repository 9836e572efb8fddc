"""Functions that wait in the middle: each in a thread of its own, only one of them ever running.

A trainer owns its loop, and several of them shall take each step together. So each runs in a
thread that stops wherever it has a request, and goes on when it is answered. Threads rather than
generators, because the request comes from deep inside other people's code; one at a time, because
that code keeps its state in globals: random numbers, accelerate's view of the gradients. They
change hands with the turn.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from queue import SimpleQueue
from typing import Any
from typing import Generic
from typing import TypeVar

import numpy as np
import torch
from accelerate.state import GradientState

T = TypeVar("T")


class Abandoned(BaseException):
    """Raised inside a coroutine that shall end, whatever it is doing."""


@dataclass(frozen=True)
class Globals:
    """The global state that each coroutine has as if it were alone.

    Attributes:
        python: State of ``random``.
        numpy: State of ``numpy.random``.
        cpu: State of torch's CPU generator.
        cuda: States of the CUDA generators.
        gradients: What accelerate knows of the current step.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]
    gradients: dict[str, Any]

    @classmethod
    def current(cls) -> Globals:
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            gradients=dict(GradientState._shared_state),
        )

    def install(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.gradients)

    def generator(self, device: torch.device) -> torch.Generator:
        """Returns a generator that goes on where the global one of the device stands."""
        generator = torch.Generator(device)
        generator.set_state(self.cuda[device.index or 0] if device.type == "cuda" else self.cpu)
        return generator

    def drawn(self, generator: torch.Generator) -> Globals:
        """Returns the same with the global generator standing where this one stands."""
        state = generator.get_state()
        if generator.device.type == "cpu":
            return replace(self, cpu=state)
        index = generator.device.index or 0
        return replace(self, cuda=[*self.cuda[:index], state, *self.cuda[index + 1 :]])


class Coroutine(Generic[T]):
    """A function in a thread of its own, which runs only while ``resume`` waits for it.

    Args:
        function: What runs there; it makes requests by ``ask``.

    Attributes:
        request: What it waits for an answer to; None when it has ended.
        result: What the function returned.
        error: What it raised.
        globals: Its global state while others run.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.request: Any = None
        self.result: T | None = None
        self.error: BaseException | None = None
        # Its own accelerator fills the gradients' state anew.
        self.globals = replace(Globals.current(), gradients={})
        self._function = function
        self._answer: Any = None
        self._raise: BaseException | None = None
        # Whose turn it is says the flag alone; what lies in the queues only wakes, so one too many
        # does no harm. A signal cannot leave them half-way, as it can an event.
        self._running = False
        self._turn: SimpleQueue[None] = SimpleQueue()
        self._back: SimpleQueue[None] = SimpleQueue()
        self._ended = False
        # A daemon: a second Ctrl-C ends the process without asking a trainer.
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def ended(self) -> bool:
        return self._ended

    def resume(self, answer: Any = None, *, error: BaseException | None = None) -> None:
        """Runs it up to its next request or its end.

        Args:
            answer: To the request it waits at.
            error: Raised there instead.
        """
        self._answer, self._raise = answer, error
        if self._thread.ident is None:
            self._thread.start()
        before = Globals.current()
        try:
            self.globals.install()
            self._let_run()
        finally:
            self.globals = Globals.current()
            before.install()
        if self._ended:
            self._thread.join()

    def abandon(self) -> None:
        """Ends it where it stands; its own ``finally`` blocks run."""
        if not self._ended:
            if self._thread.ident is None:
                self._ended = True
                return
            self.resume(error=Abandoned())

    def _let_run(self) -> None:
        interrupted: BaseException | None = None
        self._running = True
        while self._running:
            try:
                self._turn.put(None)
                self._back.get()
            except BaseException as error:
                # A signal. The thread is in the middle of something: let it come to a request.
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _run(self) -> None:
        try:
            self._take_turn()
            self.result = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.request = None
            self._ended = True
            self._give_back()

    def _take_turn(self) -> Any:
        while not self._running:
            self._turn.get()
        answer, error = self._answer, self._raise
        self._answer = self._raise = None
        if error is not None:
            raise error
        return answer

    def _give_back(self) -> None:
        self._running = False
        self._back.put(None)

    def ask(self, request: Any) -> Any:
        """Stops, in the coroutine's own thread, until the request is answered."""
        self.request = request
        self._give_back()
        return self._take_turn()
