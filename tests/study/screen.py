"""A terminal of a few lines of code, to read what is left on it."""

from __future__ import annotations

import io
import re
import time

# What rich writes beside text: colours, erasing a line, one line up, the cursor shown or hidden.
_CONTROL = re.compile(r"\x1b\[(\d*(?:;\d+)*)([mKAlh])|\x1b\[\?25([lh])")


class Screen(io.StringIO):
    """A terminal without a lower end.

    Args:
        delay: Seconds that a write takes to arrive.
    """

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self._delay = delay
        self._written: list[str] = []

    def write(self, text: str) -> int:
        time.sleep(self._delay)
        self._written.append(text)
        return len(text)

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
            elif text[at] == "\r":
                column = 0
                at += 1
                # What follows either erases the line or stands on one that is erased.
                assert column == 0
                continue
            else:
                rows[row] += text[at]
            at += 1
        return rows
