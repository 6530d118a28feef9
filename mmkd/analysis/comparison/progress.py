"""What each run is doing, shown while a comparison runs."""

from __future__ import annotations

import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class Progress:
    """One line for each run: redrawn in place on a terminal, else printed when it changes."""

    names: list[str]
    stream: TextIO
    every: float = 30.0
    state: dict[str, str] = field(default_factory=dict)
    # Re-entrant: say() draws.
    mutex: Any = field(default_factory=threading.RLock)
    drawn: int = 0
    last: float = 0.0
    printed: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, text: str, event: bool = False) -> None:
        """Sets the state of a run. ``event``: print it at once where nothing is redrawn."""
        with self.mutex:
            self.state[name] = text
            if event and not self.stream.isatty():
                self._line(name)

    def say(self, text: str) -> None:
        """Prints a line that stays above the states."""
        with self.mutex:
            self._clear()
            print(text, file=self.stream, flush=True)
            self.draw()

    def tick(self) -> None:
        with self.mutex:
            if self.stream.isatty():
                self._clear()
                self.draw()
            elif time.monotonic() - self.last >= self.every:
                self.last = time.monotonic()
                for name in self.names:
                    if self.state.get(name, '') != self.printed.get(name, ''):
                        self._line(name)

    def draw(self) -> None:
        if not self.stream.isatty():
            return
        columns = shutil.get_terminal_size().columns
        for name in self.names:
            text = f'{name:{self.width}}  {self.state.get(name, "waiting")}'
            print(text[: columns - 1], file=self.stream)
        self.stream.flush()
        self.drawn = len(self.names)

    @property
    def width(self) -> int:
        return max(map(len, self.names), default=0)

    def _clear(self) -> None:
        if self.drawn:
            self.stream.write(f'\x1b[{self.drawn}F\x1b[J')
            self.drawn = 0

    def _line(self, name: str) -> None:
        self.printed[name] = self.state.get(name, '')
        clock = time.strftime('%H:%M:%S')
        print(f'{clock}  {name:{self.width}}  {self.printed[name]}', file=self.stream, flush=True)


def training_state(log_text: str, max_epochs: int | None = None) -> str | None:
    """``iteration/total  loss  ETA`` from the last training line that MMEngine printed, or None."""
    head = r'(?:Epoch\(train\)\s*\[\s*(\d+)\]|Iter\(train\)\s*)'
    lines = re.findall(head + r'\[\s*(\d+)/\s*(\d+)\](.*)', log_text)
    if not lines:
        return None
    epoch, done, total, rest = lines[-1]
    done, total = int(done), int(total)
    if epoch:
        done += (int(epoch) - 1) * total
        total = total * max_epochs if max_epochs else 0
    text = f'training {done}/{total or "?"}'
    if loss := re.search(r'\bloss: ([^\s]+)', rest):
        text += f'  loss {float(loss[1]):.3g}'
    if eta := re.search(r'eta: (.*?\d+:\d\d:\d\d)', rest):
        text += f'  ETA {eta[1]}'
    return text


def duration(seconds: float) -> str:
    """``2 h 03 min``, ``4 min 10 s`` or ``31 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'
