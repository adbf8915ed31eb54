"""A finished ticket whose result is gone, and a failed one whose result is there: both say so, and come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from autoeval_hooks import submit
from autoeval_hooks.queue import Queue
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import Shown, StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]


def why(config_file: Path) -> str:
    shown = CliRunner().invoke(cli, ["status", "--config", str(config_file), "--json"])
    (ticket,) = json.loads(shown.stdout)["tickets"]
    return str(ticket["why"])


def retried(config_file: Path, prefix: str) -> int:
    return CliRunner().invoke(cli, ["retry", "--config", str(config_file), prefix]).exit_code


def test_a_finished_ticket_whose_result_was_lost_says_so_and_is_evaluated_again(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    root = tmp_path / "queue"
    submit(checkpoint(100), step=100, config=config_file)
    sink = Shown()
    run(StandIn(), sink=sink)
    (token,) = Queue(str(root)).tokens("done")
    assert why(config_file) == ""
    assert retried(config_file, token.ticket[:8]) == 2      # it is there: nothing to do again
    shutil.rmtree(root / "results" / token.result_name)
    assert "cannot be read (No such file or directory); `retry`" in why(config_file)
    assert retried(config_file, token.ticket[:8]) == 0
    run(StandIn(), sink=sink, name="r2")
    results, problems = store.done(root)
    assert ([r.generation for r in results], problems, why(config_file)) == ([1], [], "")
    assert {r.ticket for r in sink.results} == {token.ticket}


def test_a_failed_ticket_whose_result_was_written_but_never_committed_has_a_reason(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    root = tmp_path / "queue"
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn())
    (token,) = Queue(str(root)).tokens("done")
    (root / "done" / token.name).rename(root / "failed" / token.name)
    assert why(config_file) == store.UNCOMMITTED
    (failed,) = store.collect(root).failed
    assert failed.failure.message == store.UNCOMMITTED
