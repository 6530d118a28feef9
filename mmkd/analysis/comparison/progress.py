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
    """One line for each run: redrawn in place on a terminal, else printed when it changes.

    Below them is an estimate of the end, from the pace so far: a run is worth its ``costs`` (1
    where none is given, in any unit), ``later`` is what the runs after these are worth, and
    ``before`` what those since ``started`` were.
    """

    names: list[str]
    stream: TextIO
    every: float = 30.0
    state: dict[str, str] = field(default_factory=dict)
    # Re-entrant: say() draws.
    mutex: Any = field(default_factory=threading.RLock)
    drawn: int = 0
    last: float = 0.0
    printed: dict[str, str] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    later: float = 0.0
    before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    first: dict[str, float] = field(default_factory=dict)
    """Which part of a run an earlier call had done."""

    def set(self, name: str, text: str, event: bool = False) -> None:
        """Sets the state of a run. ``event``: print it at once where nothing is redrawn."""
        with self.mutex:
            self.state[name] = text
            if text == 'training' or ('training ' in text and name not in self.first):
                self.first[name] = self.part(name)  # 0 unless it goes on from where it was
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
                changed = [
                    n for n in self.names if self.state.get(n, '') != self.printed.get(n, '')
                ]
                for name in changed:
                    self._line(name)
                if changed and (text := self.estimate()):
                    print(f'{time.strftime("%H:%M:%S")}  {text}', file=self.stream, flush=True)

    def draw(self) -> None:
        if not self.stream.isatty():
            return
        columns, rows = shutil.get_terminal_size()
        names = self.names
        if len(names) > rows - 3:  # what has left the screen cannot be redrawn
            names = [n for n in names if n in self.state and self.part(n) < 1][: rows - 3]
        lines = [f'{name:{self.width}}  {self.state.get(name, "waiting")}' for name in names]
        lines += filter(None, [self.estimate()])
        for text in lines:
            print(text[: columns - 1], file=self.stream)
        self.stream.flush()
        self.drawn = len(lines)

    def part(self, name: str) -> float:
        """Which part of a run is done, by its state."""
        state = self.state.get(name, '')
        if state.startswith(('done', 'FAILED')):
            return 1.0
        if state == 'testing':
            return 0.95
        steps = re.match(r'training (\d+)/(\d+)', state)
        return 0.95 * int(steps[1]) / int(steps[2]) if steps else self.first.get(name, 0.0)

    def done(self) -> float:
        """What has been made since ``started``, in the unit of the costs."""
        made = {name: self.part(name) - self.first.get(name, 0.0) for name in self.names}
        return self.before + sum(self.costs.get(n, 1.0) * part for n, part in made.items())

    def estimate(self) -> str:
        """How many runs are done, and when all will be; '' before there is a pace."""
        parts = {name: self.part(name) for name in self.names}
        costs = {name: self.costs.get(name, 1.0) for name in self.names}
        done = self.done()
        left = sum(costs[n] * (1 - part) for n, part in parts.items()) + self.later
        passed = time.monotonic() - self.started
        if done <= 0 or passed < 20:
            return ''
        seconds = left * passed / done
        end = time.strftime('%a %H:%M', time.localtime(time.time() + seconds))
        count = sum(part == 1 for part in parts.values())
        return f'{count} of {len(parts)} runs done; about {duration(seconds)} left, until {end}'

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
