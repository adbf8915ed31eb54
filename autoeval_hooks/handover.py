"""Hand a complete checkpoint over: pin it, describe it, and enqueue a ticket for each suite that is due.

This is the whole work of the hook, in the order in which it must happen: the pin first, since retention
may delete the checkpoint at any moment. It blocks on the file system; `delivery` runs it in the background.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from dataclasses import dataclass, field, replace

from autoeval_hooks import config as configs
from autoeval_hooks import fsio, manifest, pin, ticket
from autoeval_hooks.config import HookConfig
from autoeval_hooks.errors import CheckpointError, ConfigError, QueueError
from autoeval_hooks.manifest import Manifest
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity, current
from autoeval_hooks.strict import near

log = logging.getLogger("autoeval")

OURS = ".autoeval"
"""Our directory beside the checkpoints of one output directory."""


@dataclass(frozen=True)
class Save:
    """What the training thread knows of a save, all of it in memory. Times in seconds since the epoch."""

    path: str
    step: int
    run: RunIdentity
    saved_at: float
    samples: int | None = None
    tokens: int | None = None


@dataclass
class Handover:
    """One save on its way. `run` may be called again after it raised: what was done is not done twice."""

    config: HookConfig
    queue: Queue
    save: Save
    suites: tuple[str, ...]
    tickets: dict[str, bool] = field(default_factory=dict)
    """Suite → whether its ticket was new. Complete when every suite stands here."""
    _manifest: Manifest | None = None
    _pin: str = ""

    def run(self) -> None:
        """Raises CheckpointError when the checkpoint cannot be handed over at all, OSError or QueueError
        when it could not be this time."""
        if self._manifest is None:
            self.prepare()
        assert self._manifest is not None
        for name in self.suites:
            if name not in self.tickets:
                self.tickets[name] = self._enqueue(name, self._manifest)
        if self._pin:
            pin.release(self._pin)
            self._pin = ""

    def prepare(self) -> None:
        """Pin the checkpoint and take its manifest, from the pin where there is one."""
        save, run_section = self.save, self.config.run
        self._pin = self._pin or self._make_pin()
        try:
            self._manifest = manifest.build(
                self._pin or save.path, path=save.path, step=save.step, run=save.run, samples=save.samples,
                tokens=save.tokens, tokenizer=run_section.tokenizer or "", saved_at=save.saved_at,
            )  # fmt: skip
        except CheckpointError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Give up: what was pinned and not handed over is freed."""
        if self._pin:
            with contextlib.suppress(OSError):
                pin.release(self._pin)
            self._pin = ""

    def _make_pin(self) -> str:
        way, path = self.config.hook.pin, self.save.path
        if way == "none":
            return ""
        if pin.count(path) >= self.config.hook.max_pins:
            log.warning(
                "autoeval: %s is not pinned: %s holds hook.max_pins = %d pins already; it is lost if retention deletes "
                "it before it is evaluated", path, pin.pins_dir(path), self.config.hook.max_pins,
            )  # fmt: skip
            return ""
        try:
            return pin.make(path, pin.pins_dir(path), way)
        except pin.PinImpossible as error:
            log.warning(
                "autoeval: %s; it is lost if retention deletes it before it is evaluated. "
                "Set `hook.pin: copy` to copy weights, or keep more checkpoints", error,
            )  # fmt: skip
            return ""

    def _enqueue(self, suite: str, found: Manifest) -> bool:
        settings = self.config.suites[suite]
        new = ticket.new(found, suite, settings.digest, settings.cadence.priority)
        if self.queue.known(new.id):
            return False
        if self._pin:
            # One pin for each ticket, so that each can be freed alone; links of links cost nothing more.
            own = pin.make(self._pin, os.path.dirname(self._pin), self.config.hook.pin)
            new = replace(new, pin=pin.adopt(own, new.id))
        return self.queue.enqueue(new)


def due(config: HookConfig, step: int) -> tuple[str, ...]:
    """The suites that a checkpoint of this step is evaluated by."""
    return tuple(name for name, suite in config.suites.items() if suite.cadence.due(step))


def submit(
    path: str | os.PathLike[str], *, step: int, config: str | os.PathLike[str],
    suites: tuple[str, ...] = (), run: RunIdentity | None = None, tokens: int | None = None,
) -> dict[str, bool]:  # fmt: skip
    """Hand the complete checkpoint directory `path` over, as the hook does, and wait for it.

    `suites` names those to use whatever their cadence says (default: those that are due at `step`), `run`
    the run that the scores belong to (default: the W&B run open in this process, else the directory's own),
    `tokens` what training had consumed. Returns suite → whether its ticket is new. Raises AutoEvalError.
    """
    settings = configs.load(config)
    where = os.path.abspath(path)
    for name in suites:
        if name not in settings.suites:
            raise ConfigError(f"{settings.path}: suites.{name}: not defined{near(name, settings.suites)}")
    names = suites or due(settings, step)
    if not names:
        raise ConfigError(f"{settings.path}: no suite is due at step {step}; name one with --suite")
    queue = Queue(settings.queue)
    queue.create()
    section = settings.run
    if tokens is None and section.tokens_per_step is not None:
        tokens = section.tokens_per_step * step
    run = run or current("", name=section.name or "", project=section.project or "", entity=section.entity or "")
    if not run.id:
        own = training_id(os.path.dirname(where), resumed=True)
        run = replace(run, id=own, name=run.name or own)
    handover = Handover(settings, queue, Save(where, step, run, time.time(), tokens=tokens), names)
    try:
        handover.run()
    except OSError as error:
        handover.abandon()
        raise QueueError(f"{where}: not handed over to {settings.queue}: {error}") from error
    return handover.tickets


def training_id(output_dir: str, *, resumed: bool) -> str:
    """The id of the training in an output directory, the same over every resume. A fresh training gets a new one."""
    path = os.path.join(output_dir, OURS, "run_id")
    if resumed:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            known = file.read(200).strip()
            if known.isalnum():
                return known
    fresh = uuid.uuid4().hex[:12]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fsio.replace(path, fresh.encode())
    return fresh


def file_system_time(output_dir: str) -> int:
    """Now, in ns, by the clock that stamps files in `output_dir`: only such times can be compared with its files'."""
    path = os.path.join(output_dir, OURS, "session")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fsio.replace(path, b"")
    return os.stat(path).st_mtime_ns
