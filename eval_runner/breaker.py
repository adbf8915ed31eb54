"""The breaker: a suite that fails on one checkpoint after the other is stopped, and its tickets wait.

    breakers/SUITE-DIGEST.json     the failures of a suite, on checkpoints that differ, since its last success

A checkpoint's own fault does not count. Once `threshold` checkpoints failed in a row, the suite is open: no
ticket of it is taken, and none uses up an attempt, until a runner has seen the file stand unchanged for a pause on
its own clock. It then tries one ticket. A success closes the breaker, another failure doubles the pause.
`autoeval-runner retry --suite NAME` closes it at once, and a changed definition is another suite.

Runners share the file without a lock: where two write at once, one failure is not counted, or one more ticket is
tried.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from autoeval_hooks import fsio, strict
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import boottime
from eval_runner.results.schema import Failure

log = logging.getLogger("autoeval")

FOLDER = "breakers"
PAUSE_S = 900.0
"""Before the first try of an open suite; doubled at each further one, up to `PAUSE_MAX_S`."""
PAUSE_MAX_S = 4 * 3600.0
COUNTED = ("transient", "configuration")
"""Kinds of failure that may be the suite's fault."""
MAX_BYTES = 1 << 20
_FILE = re.compile(r"[0-9a-f]{64}\.json")


@dataclass(frozen=True)
class Record:
    """What a breaker's file holds. `boot` and `at` are the boot of the host that wrote it last, and when in seconds
    since: whoever shares that clock counts the pause from there."""

    suite: str
    suite_digest: str
    checkpoints: tuple[str, ...] = ()
    """Digests of the checkpoints that failed."""
    open: bool = False
    tries: int = 0
    """Tickets tried since it opened."""
    why: str = ""
    boot: str = ""
    at: float = 0.0

    @property
    def pause(self) -> float:
        """Seconds from the last try to the next."""
        return min(PAUSE_S * 2.0 ** min(self.tries, 16), PAUSE_MAX_S)


@dataclass(frozen=True)
class Open:
    """A suite that is stopped: on how many checkpoints it failed in a row, and why on the last."""

    suite: str
    suite_digest: str
    failures: int
    why: str


@dataclass
class Breakers:
    """The breakers of the queue at `root`, as one runner sees them."""

    root: Path
    threshold: int
    ops: FileOps = field(default_factory=FileOps)
    clock: Callable[[], float] = boottime
    _known: dict[str, Record] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _unwritten: dict[str, Record] = field(default_factory=dict)

    def look(self) -> None:
        """Read what stands in the files now; say what was opened or closed. Raises OSError."""
        before = self._known
        self._known = {r.suite_digest: r for r in _records(self.root, self.ops)} | self._unwritten
        for digest, record in self._known.items():
            if record != before.get(digest):
                now = self.clock()
                self._since[digest] = min(record.at, now) if record.boot == _boot() else now
            if record.open and not (digest in before and before[digest].open):
                log.error("%s", said(_shown(record)))
        for digest, record in before.items():
            if record.open and digest not in self._known:
                log.info("suite %s: is no longer stopped", record.suite)

    def is_open(self, digest: str) -> bool:
        return digest in self._known and self._known[digest].open

    def any_open(self) -> bool:
        return any(record.open for record in self._known.values())

    def stops(self, digest: str) -> bool:
        """Whether no ticket of this suite may be taken now."""
        return self.is_open(digest) and self.clock() - self._since[digest] < self._known[digest].pause

    def trying(self, digest: str) -> None:
        """A ticket is taken. If its suite is open this is the one try, for which all runners' pause begins anew."""
        if self.is_open(digest):
            self._write(replace(self._known[digest], tries=self._known[digest].tries + 1))

    def failed(self, suite: str, digest: str, checkpoint: str, failure: Failure) -> bool:
        """Count a failure; whether the suite is stopped, so that the ticket is to wait without losing an attempt."""
        if failure.kind not in COUNTED:
            return False
        with contextlib.suppress(OSError):
            self.look()
        record = self._known.get(digest) or Record(suite, digest)
        seen = tuple(dict.fromkeys((*record.checkpoints, checkpoint)))
        opened = record.open or len(seen) >= self.threshold
        self._write(replace(record, checkpoints=seen[-1000:], open=opened, why=failure.message[:2000]))
        return opened

    def succeeded(self, digest: str) -> None:
        """A checkpoint was evaluated: what failed before was not the suite's fault, or is mended."""
        record = self._known.pop(digest, None)
        self._unwritten.pop(digest, None)
        if record is not None and record.open:
            log.info("suite %s: works again; it is no longer stopped", record.suite)
        try:
            _remove(self.root, digest, self.ops)
        except OSError as error:
            log.warning("breaker of suite digest %s could not be removed: %s", digest[:12], error)

    def _write(self, record: Record) -> None:
        """Keep it in memory where it cannot be written: this runner stops all the same."""
        record = replace(record, boot=_boot(), at=self.clock())
        newly = record.open and not self.is_open(record.suite_digest)
        self._known[record.suite_digest], self._since[record.suite_digest] = record, record.at
        if newly:
            log.error("%s", said(_shown(record)))
        try:
            text = json.dumps(asdict(record), allow_nan=False).encode()
            fsio.replace(str(_path(self.root, record.suite_digest)), text, self.ops)
            self._unwritten.pop(record.suite_digest, None)
        except OSError as error:
            self._unwritten[record.suite_digest] = record
            log.warning("breaker of suite %s could not be written: %s", record.suite, error)


def read(root: Path, ops: FileOps | None = None) -> list[Open]:
    """The suites that are stopped in the queue at `root`, by name."""
    found = [_shown(record) for record in _records(root, ops or FileOps()) if record.open]
    return sorted(found, key=lambda o: (o.suite, o.suite_digest))


def said(stopped: Open) -> str:
    """What is the matter with a suite that is stopped, and what to do, in one line."""
    return (
        f"suite {stopped.suite}: stopped, since it failed on {stopped.failures} checkpoint(s) in a row; its tickets "
        f"wait. The last failure: {stopped.why}. Mend that and give `autoeval-runner retry --suite {stopped.suite}`; "
        "else one ticket is tried now and then"
    )


def close(root: Path, suite_digest: str, ops: FileOps | None = None) -> bool:
    """Let a suite go on, its failures forgotten; whether there was anything to forget. Raises OSError."""
    return _remove(root, suite_digest, ops or FileOps())


def _shown(record: Record) -> Open:
    return Open(record.suite, record.suite_digest, len(record.checkpoints), record.why)


def _records(root: Path, ops: FileOps) -> Iterator[Record]:
    """All that can be read; what cannot is passed over, and said once."""
    try:
        names = ops.listdir(str(root / FOLDER))
    except FileNotFoundError:
        return
    for name in names:
        if not _FILE.fullmatch(name):
            continue
        path, errors, record = str(root / FOLDER / name), list[str](), None
        try:
            record = strict.parse(Record, ops.read(path, MAX_BYTES), path, errors, max_bytes=MAX_BYTES)
        except FileNotFoundError:
            continue        # closed meanwhile
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                raise
            errors = [f"{path}: {error.strerror}"]
        if record is not None and f"{record.suite_digest}.json" != name:
            errors, record = [f"{path}: is of another suite"], None
        if record is not None:
            yield record
        elif errors[0] not in _said:
            _said.add(errors[0])
            log.warning("%s; passed over, remove it", errors[0])


_said: set[str] = set()


def _remove(root: Path, digest: str, ops: FileOps) -> bool:
    path = _path(root, digest)
    with contextlib.suppress(FileNotFoundError):
        ops.unlink(str(path))
        return True
    return False


def _path(root: Path, digest: str) -> Path:
    return root / FOLDER / f"{digest}.json"


def _boot() -> str:
    """The name of this boot of this host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
