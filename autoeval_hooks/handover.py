"""Hand a complete checkpoint over: pin it, describe it, and enqueue a ticket for each suite that is due.

This is the whole work of the hook, in the order in which it must happen: the pin first, since retention
may delete the checkpoint at any moment. It blocks on the file system; `delivery` runs it in the background.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from autoeval_hooks import config as configs
from autoeval_hooks import fsio, layouts, manifest, pin, run_identity, strict, ticket
from autoeval_hooks.config import HookConfig
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.manifest import Manifest, MegatronRecord
from autoeval_hooks.queue import Queue
from autoeval_hooks.retention import make_room, tidy_pins
from autoeval_hooks.run_identity import RunIdentity, current
from autoeval_hooks.strict import near
from autoeval_hooks.ticket import Ticket

log = logging.getLogger("autoeval")

OURS = os.path.dirname(ticket.PINS)
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
    megatron: MegatronRecord | None = None


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
    _unpinned: str = ""
    """Why there is no pin, where one was wanted: said once, with the first ticket that is new."""

    def run(self) -> None:
        """Raises CheckpointError when the checkpoint cannot be handed over at all, OSError or QueueError
        when it could not be this time."""
        if self._pin:
            pin.keep(self._pin)
        if self._manifest is None:
            self.prepare()
        assert self._manifest is not None
        for name in self.suites:
            if name not in self.tickets:
                self.tickets[name] = self._enqueue(name, self._manifest)
        if self._pin:
            pin.release(self._pin, self.queue.ops)
            self._pin = ""

    def prepare(self) -> None:
        """Pin the checkpoint and take its manifest, from the pin where there is one."""
        self._pin = self._pin or self._make_pin()
        try:
            self._manifest = self._build(self._pin or self.save.path)
        except CheckpointError:
            self.abandon()
            raise

    def _build(self, directory: str) -> Manifest:
        save = self.save
        return manifest.build(
            directory, path=save.path, step=save.step, run=save.run, samples=save.samples, tokens=save.tokens,
            tokenizer=self.config.run.tokenizer or "", saved_at=save.saved_at, megatron=save.megatron,
        )  # fmt: skip

    def abandon(self) -> None:
        """Give up: what was pinned and not handed over is freed."""
        if self._pin:
            with contextlib.suppress(OSError):
                pin.release(self._pin, self.queue.ops)
            self._pin = ""

    def _make_pin(self) -> str:
        hook, path = self.config.hook, self.save.path
        if hook.pin == "none":
            return ""
        if self._full():
            tidy_pins(self.queue, os.path.dirname(path))
        if self._full() and not self._room():
            self._unpinned = (
                f"{path} is not pinned: {pin.pins_dir(path)} holds hook.max_pins = {hook.max_pins} pins already; "
                "it is lost if retention deletes it before it is evaluated"
            )
            return ""
        try:
            return pin.make(path, pin.pins_dir(path), hook.pin, self.queue.ops)
        except pin.PinImpossible as error:
            self._unpinned = (
                f"{error}; it is lost if retention deletes it before it is evaluated. Set `hook.pin: copy` to copy "
                "weights, or keep more checkpoints: `hook.save_total_limit` in place of the Trainer's spares those "
                "that wait"
            )
            return ""

    def _full(self) -> bool:
        """Whether a pin for each suite would be more than `hook.max_pins`."""
        return len(pin.existing(self.save.path)) + len(self.suites) > self.config.hook.max_pins

    def _room(self) -> bool:
        """Whether there is room for one more pin at least, made by `hook.on_full` if need be."""
        hook, save = self.config.hook, self.save
        if hook.on_full == "unpinned":
            return len(pin.existing(save.path)) < hook.max_pins
        found = self._build(save.path)      # who is known already needs no room
        wanted = sum(not self.queue.known(self._ticket(suite, found).id) for suite in self.suites)
        return wanted > 0 and make_room(self.queue, save.path, save.step, wanted=wanted, limit=hook.max_pins)

    def _ticket(self, suite: str, found: Manifest) -> Ticket:
        settings = self.config.suites[suite]
        return ticket.new(found, suite, settings.digest, settings.cadence.priority)

    def _enqueue(self, suite: str, found: Manifest) -> bool:
        new = self._ticket(suite, found)
        if self.queue.known(new.id):
            return False
        if self._unpinned:
            log.warning("autoeval: %s", self._unpinned)
            self._unpinned = ""
        if self._pin:
            # One pin for each ticket, so that each can be freed alone; links of links cost nothing more.
            own = pin.make(self._pin, os.path.dirname(self._pin), self.config.hook.pin, self.queue.ops)
            new = replace(new, pin=pin.adopt(own, new.id, self.queue.ops))
        return self.queue.enqueue(new)


def due(config: HookConfig, step: int) -> tuple[str, ...]:
    """The suites that a checkpoint of this step is evaluated by."""
    return tuple(name for name, suite in config.suites.items() if suite.cadence.due(step))


def submit(
    path: str | os.PathLike[str], *, step: int | None = None, config: str | os.PathLike[str],
    suites: tuple[str, ...] = (), run: RunIdentity | None = None, tokens: int | None = None,
) -> dict[str, bool]:  # fmt: skip
    """Hand the complete checkpoint directory `path` over, as the hook does, and wait for it.

    `step` is what the directory's name says if it is left out (`checkpoint-10`, `iter_0000010`); for a checkpoint of
    Megatron's it can be nothing else. `suites` names those to use whatever their cadence says (default: those that are
    due at `step`), `run` the run that the scores belong to (default: the W&B run open in this process, else the
    directory's own), `tokens` what training had consumed. Returns suite → whether its ticket is new. Raises
    AutoEvalError.
    """
    settings = configs.load(config)
    where = os.path.abspath(path)
    if not os.path.isdir(where):
        raise CheckpointError(f"{where}: not a directory; name the checkpoint's own")
    step = _step_of(where, step)
    for name in suites:
        if name not in settings.suites:
            raise ConfigError(f"{settings.path}: suites.{name}: not defined{near(name, settings.suites)}")
    names = suites or due(settings, step)
    if not names:
        raise ConfigError(f"{settings.path}: no suite is due at step {step}; name one with --suite")
    queue = Queue(settings.queue)
    if tokens is None and settings.run.tokens_per_step is not None:
        tokens = settings.run.tokens_per_step * step
    try:
        queue.create()
        run = run or _run_of(where, settings)
        handover = Handover(settings, queue, Save(where, step, run, time.time(), tokens=tokens), names)
        with abandoned_on_failure(handover):
            handover.run()
    except OSError as error:
        raise AutoEvalError(f"{where}: not handed over to {settings.queue}: {error}; try again") from error
    return handover.tickets


def _step_of(checkpoint: str, given: int | None) -> int:
    """The step that a checkpoint given by hand was saved at. Raises AutoEvalError."""
    name, iteration = os.path.basename(checkpoint), layouts.iteration(checkpoint)
    try:
        megatron = layouts.is_megatron(os.listdir(checkpoint))
    except OSError as error:
        raise AutoEvalError(f"{checkpoint}: cannot be listed ({error.strerror}); try again") from error
    if megatron:
        if not iteration:
            raise ConfigError(
                f"{checkpoint}: Megatron finds a checkpoint by its iteration, from 1, and {name!r} does not name one "
                "as iter_0000010 does; give the directory such a name"
            )
        if given not in (None, iteration):
            raise ConfigError(f"--step: {given} is not the iteration of {checkpoint}, by which Megatron finds it; "
                              "leave --step out")  # fmt: skip
        return iteration
    found = re.fullmatch(r"checkpoint-(\d{1,18})", name)
    step = given if given is not None else int(found[1]) if found else iteration
    if step is None:
        raise ConfigError(f"--step: missing, and {name!r} does not tell it as checkpoint-10 does; give the step that "
                          "the checkpoint was saved at")  # fmt: skip
    if step < 0:
        raise ConfigError(f"--step: {step} is less than 0; give the step that the checkpoint was saved at")
    return step


@contextlib.contextmanager
def abandoned_on_failure(handover: Handover) -> Iterator[None]:
    """For a hand-over that nobody tries again."""
    try:
        yield
    except BaseException:
        handover.abandon()
        raise


def _run_of(checkpoint: str, settings: HookConfig) -> RunIdentity:
    """The run that a checkpoint given by hand belongs to: the one that is open here, else its directory's."""
    output_dir = os.path.dirname(checkpoint)
    own = training_id(output_dir, resumed=True)
    run = identity(settings)
    if not run.wandb_id:
        run = remembered(output_dir) or run
    return replace(run, id=own, name=run.name or own)


def identity(settings: HookConfig) -> RunIdentity:
    """The run as the configuration and the W&B run open in this process name it, without our own id yet."""
    section = settings.run
    return current("", name=section.name or "", project=section.project or "", entity=section.entity or "")


def remember(output_dir: str, run: RunIdentity) -> None:
    """Note which run trains in an output directory, for what is submitted by hand later."""
    fsio.replace(os.path.join(output_dir, OURS, "run.json"), json.dumps(asdict(run)).encode())


def remembered(output_dir: str) -> RunIdentity | None:
    """What `remember` noted; None where it cannot be read."""
    try:
        text = fsio.FileOps().read(os.path.join(output_dir, OURS, "run.json"), 1 << 16)
    except OSError:
        return None
    run = strict.parse(RunIdentity, text, "run.json", [], max_bytes=1 << 16)
    return None if run is None or run_identity.problem(run) else run


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


def began_ns(output_dir: str) -> int | None:
    """When the training in an output directory was first seen, by the clock that stamps its files; None if never."""
    try:
        return os.stat(os.path.join(output_dir, OURS, "run_id")).st_mtime_ns
    except FileNotFoundError:
        return None


def file_system_time(output_dir: str) -> int:
    """Now, in ns, by the clock that stamps files in `output_dir`: only such times can be compared with its files'."""
    path = os.path.join(output_dir, OURS, "session")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fsio.replace(path, b"")
    return os.stat(path).st_mtime_ns
