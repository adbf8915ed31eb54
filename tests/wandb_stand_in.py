"""A stand-in for the child processes of the W&B sink, for tests of what it decides, and the files of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks import relay_files as files
from eval_runner.sinks.wandb_reader import Held, Look, save
from eval_runner.sinks.wandb_writer import Request
from tests.wandb_trainer import point


@dataclass
class StandIn:
    """A stand-in for the child processes. The writer delivers all, or ends with `status`; the reader finds `held`.
    What they were asked, and with what arguments they were run, is kept."""

    status: int | Exception = 0
    held: Held = field(default_factory=lambda: Held(True, "finished", []))
    wrote: list[tuple[Request, dict[str, Any]]] = field(default_factory=list)
    looked: list[Look] = field(default_factory=list)

    def run(self, argv: list[str], **kwargs: Any) -> int:
        data = Path(argv[-1]).read_bytes()
        kwargs["log"].write_text("it said this\n")
        if isinstance(self.status, Exception):
            raise self.status
        if argv[-2].endswith("wandb_reader"):
            self.looked.append(files.parse(Look, data, "look"))
            if self.status == 0:
                save(self.held, Path(self.looked[-1].answer))
            return self.status
        self.wrote.append((files.parse(Request, data, "request"), kwargs))
        request = self.wrote[-1][0]
        for name in files.waiting(request.relay) if self.status == 0 else ():
            done = f"logged/{files.taken(files.ticket_of(name), request.who)}"
            assert files.move(request.relay, f"points/{name}", done)
        return self.status


def standing(directory: Path) -> dict[str, list[int]]:
    """Stage → the steps of the points in it, where there are any."""
    stages = {stage: os.listdir(directory / stage) for stage in files.STAGES}
    found = {stage: sorted(int(files.ticket_of(name), 16) for name in names) for stage, names in stages.items()}
    return {stage: steps for stage, steps in found.items() if steps}


def take(directory: Path, step: int, who: str, stage: str = "taken") -> None:
    ticket = point(step).ticket
    assert files.move(str(directory), f"points/{ticket}.json", f"{stage}/{files.taken(ticket, who)}")
