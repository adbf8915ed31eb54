"""Hand a checkpoint that was found over, as the hook of its training would have: the same queue, the same tickets."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, replace

from autoeval_hooks import handover, layouts, ticket
from autoeval_hooks.config import HookConfig, HookSuite
from autoeval_hooks.handover import Handover, Save
from autoeval_hooks.manifest import MegatronRecord
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.config.legacy import Older
from eval_runner.config.models import Config
from eval_runner.watching.described import describe


@dataclass
class Giver:
    """Hands over to the queue of `config`, for the suites in it. `several`: more than one directory is watched, each of
    which is a run of its own, named by `run.name`, the directory and its training's id, whichever others there are."""

    config: Config
    older: Older | None = None
    several: bool = False
    _runs: dict[str, RunIdentity] = field(default_factory=dict)

    def due(self, step: int) -> tuple[str, ...]:
        """The suites that a checkpoint of this step is evaluated by."""
        return tuple(name for name, suite in self.config.suites.items() if suite.cadence.due(step))

    def key(self, directory: str, step: int) -> str:
        """Stands for what a checkpoint of this step is handed over as: its run and the definitions of its suites."""
        parts = [self.run(directory).id, *(self.config.suites[name].digest for name in self.due(step))]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def give(self, path: str, step: int, saved_at: float) -> dict[str, bool]:
        """Suite → whether its ticket is new. `saved_at` is in seconds since the epoch. Raises what `Handover.run`
        does."""
        directory = os.path.dirname(path)
        queue = Queue(str(self.config.queue))
        queue.create()
        record, tokens = self._described(path, step)
        save = Save(path, step, self.run(directory), saved_at, tokens=tokens, megatron=record)
        work = Handover(self._hook(directory), queue, save, self.due(step))
        with handover.abandoned_on_failure(work):
            work.run()
        return work.tickets

    def run(self, directory: str) -> RunIdentity:
        """The run that the checkpoints in a directory belong to: the one that a hook noted there, else one by the
        configuration. Raises OSError."""
        if directory not in self._runs:
            self._runs[directory] = self._identity(directory)
        return self._runs[directory]

    def _identity(self, directory: str) -> RunIdentity:
        own = _id(directory)
        if known := handover.remembered(directory):
            return replace(known, id=own)
        section = self.config.run
        name, tail = section.name or os.path.basename(directory), ""
        if self.several:
            name += f"-{os.path.basename(directory)}" if section.name else ""
            tail = f"-{own[:12]}"       # directories are often called alike: a/checkpoints, b/checkpoints
        run = RunIdentity(own, name + tail, section.project or "", section.entity or "")
        sink = next((s for s in self.config.sinks if s["type"] == "wandb" and s.get("late") == "companion"), None)
        if sink is None or not (section.name and section.project):
            return run
        # Nobody trains in this run of W&B's: it only names the one beside it, `<id>-eval`, which the sink writes.
        wandb_id = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100 - len(tail)].lstrip(".") + tail
        mode = os.environ.get("WANDB_MODE", "online")
        return replace(run, wandb_id=wandb_id, wandb_group=run.name, wandb_base_url=sink.get("base_url", ""),
                       wandb_mode=mode)  # fmt: skip

    def _described(self, path: str, step: int) -> tuple[MegatronRecord | None, int | None]:
        """The record of a checkpoint of Megatron's, and the tokens consumed where they are known."""
        per_step = self.config.run.tokens_per_step
        tokens = None if per_step is None else per_step * step
        if not layouts.is_megatron(os.listdir(path)):
            return None, tokens
        section = self.older.section.megatron if self.older else None
        record, samples = describe(path, section, self._tokenizer())
        if tokens is None and samples and record.seq_length:
            tokens = samples * record.seq_length
        return record, tokens

    def _tokenizer(self) -> dict[str, str]:
        """Megatron's arguments for the older file's tokenizer."""
        files = self.older.files if self.older else {}
        names = {"vocab_path": "vocab_file", "merge_path": "merge_file", "tokenizer_path": "tokenizer_model"}
        return {ours: files[key] for old, ours in names.items() if (key := f"auto_eval.megatron.{old}") in files}

    def _hook(self, directory: str) -> HookConfig:
        """As the hook would have it, but that a backlog of many checkpoints ends no ticket, and that nothing is pinned
        where this user may not write."""
        c = self.config
        hook = replace(c.hook, on_full="unpinned", pin=c.hook.pin if writable(directory) else "none")
        suites = {name: HookSuite(suite.cadence, suite.digest) for name, suite in c.suites.items()}
        return HookConfig(str(c.path), str(c.queue), c.run, hook, c.path_map, suites)


def writable(directory: str) -> bool:
    """Whether pins can be made beside the checkpoints of a directory."""
    places = [os.path.join(directory, ticket.PINS), os.path.join(directory, handover.OURS), directory]
    return os.access(next(place for place in places if os.path.exists(place) or place == directory), os.W_OK | os.X_OK)


def _id(directory: str) -> str:
    """The id of the training in a directory, as a hook there would have it; by its path where nothing can be noted."""
    if writable(directory):
        return handover.training_id(directory, resumed=True)
    path = os.path.join(directory, handover.OURS, "run_id")
    if os.access(path, os.R_OK):
        with open(path, encoding="utf-8") as file:
            if (known := file.read(200).strip()).isalnum():
                return known
    return hashlib.sha256(os.path.realpath(directory).encode()).hexdigest()[:12]
