"""A terminal of a few lines of code, to read what is left on it."""

from __future__ import annotations

import io
import re
import threading

# What rich writes beside text: colours, erasing a line, one line up, the cursor shown or hidden.
_CONTROL = re.compile(r"\x1b\[(\d*(?:;\d+)*)([mKAlh])|\x1b\[\?25([lh])")


class Screen(io.StringIO):
    """A terminal without a lower end."""

    def __init__(self) -> None:
        super().__init__()
        self._written: list[str] = []
        self._here = threading.current_thread()
        self._drawn_on = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._written.append(text)
        if threading.current_thread() is not self._here:
            self._drawn_on.set()
        return len(text)

    def is_drawn_on(self, *, timeout: float) -> bool:
        """Waits until another thread writes, for so many seconds; returns whether one did."""
        self._drawn_on.clear()
        return self._drawn_on.wait(timeout)

    def lines(self) -> list[str]:
        """What is left to see, line by line."""
        text, rows, row = "".join(self._written), [""], 0
        at = 0
        while at < len(text):
            control = _CONTROL.match(text, at)
            if control:
                at = control.end()
                if control[2] == "A":
                    row = max(0, row - int(control[1] or 1))
                elif control[2] == "K":
                    rows[row] = ""
                continue
            if text[at] == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif text[at] != "\r":
                # What follows that either erases the line or stands on one that is erased.
                rows[row] += text[at]
            at += 1
        return rows
