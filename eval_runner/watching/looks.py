"""What stands in a directory of checkpoints at one moment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from autoeval_hooks import layouts
from autoeval_hooks.manifest import GONE
from autoeval_hooks.retention import CHECKPOINT
from eval_runner.checkpoints.megatron import TRACKER

Kind = Literal["megatron", "huggingface"]


@dataclass(frozen=True)
class Look:
    """The checkpoints of one directory by step. Those up to `saved` have been saved, as far as the directory tells:
    one of them that is not there was deleted, or never was; one beyond is being written. `saved` is -1 where none has
    been, and `why` may say then how that is known."""

    paths: dict[int, str]
    saved: int
    why: str = ""


def look(directory: str, kind: Kind | None) -> Look:
    """Look at a directory; without a kind, its content tells. Raises OSError.

    Megatron-LM names the last complete iteration in a file, anew at every save: after a resume from an earlier
    iteration it names an earlier one, and what stands beyond will be written again. During the first save the file is
    not there yet. Of a Trainer's checkpoints, a later directory says that an earlier save is over.
    """
    names = os.listdir(directory)
    if kind is None:
        megatron = TRACKER in names or any(_is_megatron(directory, name) for name in names)
        kind = "megatron" if megatron else "huggingface"
    step_of = layouts.iteration if kind == "megatron" else _step
    found = {step: name for name in names if (step := step_of(name)) is not None}
    saved = tracked(directory) if kind == "megatron" else max(found, default=-1)
    why = f"Megatron-LM's {TRACKER} names none" if found and saved < 0 else ""
    return Look({step: os.path.join(directory, found[step]) for step in sorted(found)}, saved, why)


def tracked(directory: str) -> int:
    """The iteration that Megatron's tracker names; -1 where there is none so far, or none in it (``release``). The
    file is written in place, so that it may be there and empty."""
    try:
        with open(os.path.join(directory, TRACKER), "rb") as file:
            text = file.read(64).strip()
    except FileNotFoundError:
        return -1
    return int(text) if text.isdigit() else -1


def _is_megatron(directory: str, name: str) -> bool:
    if layouts.iteration(name) is None:
        return False
    try:
        return layouts.is_megatron(os.listdir(os.path.join(directory, name)))
    except GONE:        # deleted meanwhile, or no directory
        return False


def _step(name: str) -> int | None:
    found = CHECKPOINT.fullmatch(name)
    return int(found[1]) if found else layouts.iteration(name)
