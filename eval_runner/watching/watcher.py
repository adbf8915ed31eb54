"""Look at directories of checkpoints, again and again, and hand over what is complete, wanted and new.

A checkpoint counts as complete when its files say so at two looks between which nothing was written. One that was
handed over is remembered by what its files look like, over restarts too; that is a shortcut only: the queue knows its
tickets. One that is not there although a later one is, or that went again, is passed over, and reported once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from autoeval_hooks import fsio
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError, IncompleteError
from eval_runner.stop import Stop
from eval_runner.watching import complete
from eval_runner.watching.given import Giver, writable
from eval_runner.watching.looks import Kind, Look, look

SETTLE_S = 5.0
"""Between two looks at a checkpoint that seems complete: what is still being written changes meanwhile."""
RETRY_S = 60.0
"""After which what failed for a reason that may pass is tried again, if the next look comes no sooner."""
SHOWN = 5
"""Steps that a message names one by one."""


@dataclass(frozen=True)
class Wanted:
    """The steps to evaluate: from `begin`, every `interval`, to `end`, which is included. Without an interval, all that
    are there."""

    begin: int = 0
    end: int | None = None
    interval: int | None = None

    def has(self, step: int) -> bool:
        beyond = self.end is not None and step > self.end
        return step >= self.begin and not beyond and (step - self.begin) % (self.interval or 1) == 0

    @property
    def last(self) -> int | None:
        """The last step of all; None where there is no end."""
        if self.end is None or self.interval is None or self.end < self.begin:
            return self.end
        return self.end - (self.end - self.begin) % self.interval

    def expected(self, after: int, saved: int) -> range:
        """The steps greater than `after` and no greater than `saved` that must have been saved; none without an
        interval, since nothing says then which."""
        if self.interval is None:
            return range(0)
        first = self.begin
        if after >= first:
            first += (after - first) // self.interval * self.interval + self.interval
        stop = saved if self.last is None else min(saved, self.last)
        return range(first, stop + 1, self.interval)


@dataclass
class Place:
    """One directory, and what this process knows of it. Steps and paths of checkpoints → what their files look like."""

    directory: str
    seen: dict[str, str] = field(default_factory=dict)
    """At the last look, of those that seemed complete."""
    refused: dict[str, str] = field(default_factory=dict)
    """Of those that can never be evaluated as they are."""
    waiting: frozenset[int] = frozenset()
    """Wanted ones that were there at the last look, and not handed over."""
    passed: int = -1
    """The missing ones up to this step were reported."""
    idle: int | None = None
    """The last saved step of the look before, if nothing was left to do then."""


@dataclass
class Watcher:
    """Looks at `directories`, which are absolute. `say` is given what a user should know, once each."""

    giver: Giver
    directories: tuple[str, ...]
    wanted: Wanted
    kind: Kind | None
    say: Callable[[str], None]
    enqueued: int = 0
    """Tickets that were new."""
    _said: dict[str, str] = field(default_factory=dict)
    _soon: float | None = None

    def __post_init__(self) -> None:
        self._places = [Place(directory) for directory in self.directories]
        self._memory = Memory(str(self.giver.config.queue), self.directories)

    def look(self) -> bool:
        """One look at all directories; whether everything that was asked for is enqueued or passed over."""
        self._soon = None
        over = [self._look(place) for place in self._places]
        return all(over)

    def pause(self, interval: float) -> float:
        """Seconds until the next look."""
        return interval if self._soon is None else min(interval, self._soon)

    def watch(self, interval: float, stop: Stop, after_look: Callable[[], None] = lambda: None) -> bool:
        """Look every `interval` seconds until all is done, which is True, or `stop` is set."""
        while not stop.is_set():
            over = self.look()
            after_look()
            if over:
                return True
            stop.wait(self.pause(interval))
        return False

    # ------------------------------------------------------------------ one directory

    def _look(self, place: Place) -> bool:
        try:
            found = look(place.directory, self.kind)
        except OSError as error:
            self._once(place.directory, f"{place.directory}: cannot be looked at ({error.strerror}); trying again")
            self._again(RETRY_S)
            return False
        self._recovered(place.directory)
        if found.saved < 0:
            why = f" ({found.why})" if found.why else ""
            self._once(f"{place.directory} none", f"{place.directory}: no complete checkpoint so far{why}")
        self._report_missing(place, found)
        wanted = {step: path for step, path in found.paths.items()
                  if step <= found.saved and self.wanted.has(step) and self.giver.due(step)}  # fmt: skip
        done = {step for step, path in wanted.items() if self._hand_over(place, step, path, found.saved)}
        place.waiting = frozenset(wanted.keys() - done)
        last = self.wanted.last
        if last is not None and found.saved < last:
            self._say_what_comes(place, found.saved, last)
        return last is not None and found.saved >= last and not place.waiting

    def _hand_over(self, place: Place, step: int, path: str, saved: int) -> bool:
        """Whether there is nothing left to do for a checkpoint: it is handed over, or passed over for good."""
        try:
            names = complete.check(path)
            seen, newest = complete.look(path, names)
            known = f"{self.giver.key(place.directory, step)} {seen}"
            if self._memory.holds(path, known):
                return True
            if place.refused.get(path) == seen:
                return True
            if place.seen.get(path) != seen:
                place.seen[path] = seen
                self._again(SETTLE_S)
                return False
            return self._give(place, step, path, (seen, newest), known)
        except IncompleteError as error:
            place.seen.pop(path, None)
            later = step < saved
            what = "; a later one is there, so it is passed over unless it changes" if later else ""
            self._once(path, f"step {step} is not complete: {error}{what}")
            if not later:
                self._again(RETRY_S)
            return later
        except CheckpointError as error:
            self._once(path, f"step {step} is passed over: {error}")
            return True
        except (OSError, AutoEvalError) as error:
            self._once(path, f"step {step}: {error}; trying again")
            self._again(RETRY_S)
            return False

    def _give(self, place: Place, step: int, path: str, look: tuple[str, int], known: str) -> bool:
        seen, newest = look
        try:
            tickets = self.giver.give(path, step, newest / 1e9)
        except IncompleteError:
            raise
        except (CheckpointError, ConfigError) as error:
            place.refused[path] = seen
            self._once(path, f"step {step} is passed over: {error}")
            return True
        self._recovered(path)
        self._memory.add(path, known)
        new = [suite for suite, is_new in tickets.items() if is_new]
        self.enqueued += len(new)
        self.say(f"step {step}: {'enqueued for ' + ', '.join(new) if new else 'known already'} ({path})")
        if not writable(place.directory):
            self._once(f"{place.directory} pin", f"{place.directory}: may not be written, so nothing is pinned: a "
                       "checkpoint that is deleted before it is evaluated is lost")  # fmt: skip
        return True

    def _report_missing(self, place: Place, found: Look) -> None:
        """Report, once, steps that must have been saved and are not there, and those that went before they were
        handed over."""
        expected = self.wanted.expected(place.passed, found.saved)
        missing = [step for step in expected if step not in found.paths and self.giver.due(step)]
        if expected:
            place.passed = expected[-1]
        if missing:
            self.say(f"{place.directory}: passed over, for a later checkpoint is there and these are not (deleted, or "
                     f"never saved): {_shown(missing)}")  # fmt: skip
        if gone := sorted(place.waiting - found.paths.keys()):
            self.say(f"{place.directory}: passed over, for these were deleted before they could be handed over: "
                     f"{_shown(gone)}")  # fmt: skip

    def _say_what_comes(self, place: Place, saved: int, last: int) -> None:
        """What the watch waits for, once no more came since the last look: nothing tells whether training is over."""
        idle = None if place.waiting else saved
        if idle is not None and idle == place.idle and saved >= self.wanted.begin:
            self._once(f"{place.directory} last", f"{place.directory}: waiting for step {last} or a later one "
                       f"(--end-iteration); the latest is {saved}. If training is over, stop this, and run it again "
                       f"with --end-iteration {saved}, which ends by itself")  # fmt: skip
        place.idle = idle

    # ------------------------------------------------------------------ what is said, and when to look again

    def _once(self, key: str, text: str) -> None:
        if self._said.get(key) != text:
            self._said[key] = text
            self.say(text)

    def _recovered(self, key: str) -> None:
        self._said.pop(key, None)

    def _again(self, seconds: float) -> None:
        self._soon = seconds if self._soon is None else min(self._soon, seconds)


def _shown(steps: list[int]) -> str:
    more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
    return ", ".join(map(str, steps[:SHOWN])) + more


class Memory:
    """Which checkpoints were handed over, by what their files looked like: a small file in the queue, so that a restart
    need not read them all again. One that cannot be read or written is no reason to stop."""

    def __init__(self, queue: str, directories: Iterable[str]) -> None:
        self._file = os.path.join(queue, "watch", f"{fsio.hostname()}.json")
        self._under = tuple(directories)
        self._known = {path: known for path, known in self._read() if os.path.dirname(path) in self._under}

    def holds(self, path: str, known: str) -> bool:
        return self._known.get(path) == known

    def add(self, path: str, known: str) -> None:
        self._known[path] = known
        try:
            os.makedirs(os.path.dirname(self._file), exist_ok=True)
            others = {p: k for p, k in self._read() if os.path.dirname(p) not in self._under}     # other watchers'
            fsio.replace(self._file, json.dumps(others | self._known, indent=0).encode())
        except OSError:
            return      # the queue knows its tickets

    def _read(self) -> Iterator[tuple[str, str]]:
        try:
            with open(self._file, "rb") as file:
                found = json.loads(file.read())
        except (OSError, ValueError):
            return
        for path, known in found.items() if isinstance(found, dict) else ():
            if isinstance(known, str):
                yield path, known
