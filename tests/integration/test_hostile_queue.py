"""A queue in which somebody left what nobody should: it is refused, visibly, and the next ticket is evaluated."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks import relay_files, submit
from autoeval_hooks import ticket as tickets
from autoeval_hooks.queue import Queue
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import Shown, StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]
FOREIGNER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")


def states(tmp_path: Path) -> list[str]:
    return sorted(t.state for t in Queue(str(tmp_path / "queue")).tokens())


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the one pending ticket in place: both its names show it."""
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    path = Path(queue.root, "pending", token.name)
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def replaced(tmp_path: Path, make: Callable[[Path], object]) -> None:
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    path = Path(queue.root, "pending", token.name)
    path.unlink()
    make(path)


def huge_number(data: dict[str, Any]) -> None:
    data["manifest"]["saved_at"] = 10**400


def escaping_file(data: dict[str, Any]) -> None:
    data["manifest"]["files"][0]["path"] = "../../etc/passwd"


def escaping_pin(data: dict[str, Any]) -> None:
    data["pin"] = data["pin"] + "/../../../.."


def escaping_run(data: dict[str, Any]) -> None:
    data["manifest"]["run"]["wandb_id"] = "../../../x"


def command(data: dict[str, Any]) -> None:
    data["command"] = "touch /tmp/x"


def surrogate(data: dict[str, Any]) -> None:
    data["manifest"]["host"] = "\ud800"


@pytest.mark.parametrize("change", [huge_number, escaping_file, escaping_pin, escaping_run, command, surrogate])
def test_a_hostile_ticket_is_put_aside_and_the_next_is_evaluated(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, change: Callable[[dict[str, Any]], None]
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    changed(tmp_path, change)
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    before = sorted(tmp_path.rglob("out/**"))
    sink = Shown()
    run(StandIn(), sink=sink)
    assert [r.step for r in sink.results] == [200]
    assert states(tmp_path) == ["done", "quarantine"]
    (failed,) = store.collect(tmp_path / "queue").failed
    assert failed.failure.message
    assert len(failed.failure.message) < 2000
    kept = {p for p in before if ".autoeval" not in p.parts}
    assert kept <= set(tmp_path.rglob("out/**"))        # nothing was deleted but the pin of the other


PLACES: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir, "pipe": os.mkfifo, "link": lambda p: p.symlink_to("/etc/passwd"),
    "dangling": lambda p: p.symlink_to("nowhere"), "empty": lambda p: p.write_bytes(b""),
    "large": lambda p: p.write_bytes(b" " * (tickets.MAX_BYTES + 1)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_put_aside_too(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, place: str
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    replaced(tmp_path, PLACES[place])
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    sink = Shown()
    run(StandIn(), sink=sink)
    assert [r.step for r in sink.results] == [200]
    assert states(tmp_path) == ["done", "quarantine"]
    status = CliRunner().invoke(cli, ["status", "--config", str(config_file)], catch_exceptions=False)
    assert "not a regular file" in status.stdout or "not valid JSON" in status.stdout or "the limit is" in status.stdout


def test_what_only_looks_like_a_ticket_is_left_alone(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    """A name that is not the token's own could not be renamed: `--drain` would never end."""
    submit(checkpoint(200), step=200, config=config_file)
    for name in (f"0-1-{'a' * 64}~g007f0", f"0-1-{'b' * 64}~g\u0667f0", ".nfs0001", "notes.txt"):
        (tmp_path / "queue" / "pending" / name).write_bytes(b"{}")
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_a_heart_that_is_none_stops_nobody(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    """A claim's name says where the heart beats. A directory there is no heart, and others' tickets are evaluated."""
    submit(checkpoint(100), step=100, config=config_file)
    ghost = Queue(str(tmp_path / "queue"), runner="ghost")
    assert ghost.claim() is not None
    (tmp_path / "queue" / "hb" / "ghost").mkdir()
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 1.0"))
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_stray_names_in_results_break_no_command(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    token = queue.claim()
    assert token is not None
    queue.release(token, failed=True, max_failures=1)
    for name in (token.ticket, f"{token.ticket}~gX~r", f"{token.ticket}~g1", "notes"):
        (tmp_path / "queue" / "results" / name).mkdir()
    for argv in (["status"], ["explain", "100"], ["report", "--out", str(tmp_path / "r")]):
        shown = CliRunner().invoke(cli, [*argv, "--config", str(config_file)], catch_exceptions=False)
        assert shown.exit_code == 0


def test_what_was_refused_as_a_point_is_told(tmp_path: Path, config_file: Path) -> None:
    Queue(str(tmp_path / "queue")).create()
    run = tmp_path / "queue" / "relay" / "run-1"
    (run / "points").mkdir(parents=True)
    (run / "points" / "odd.json").write_text("{")
    relay_files.set_aside(str(run), "odd.json", "it is torn")
    shown = CliRunner().invoke(cli, ["status", "--config", str(config_file)])
    assert f"1 file(s) that are no points were refused: {run}/refused says why" in shown.stdout


def test_text_of_others_cannot_steer_the_terminal(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    ticket = queue.read(token)
    evil = "\x1b]0;title\x07\x1b[2J\u202eevil"
    odd = replace(ticket, manifest=replace(ticket.manifest, run=replace(ticket.manifest.run, name=evil)))
    Path(queue.root, "pending", token.name).write_bytes(tickets.dump(odd))
    for argv in (["status"], ["explain", "100"]):
        shown = CliRunner().invoke(cli, [*argv, "--config", str(config_file)], catch_exceptions=False)
        assert "evil" in shown.stdout
        assert not set("\x1b\x07\u202e") & set(shown.stdout)


# ---------------------------------------------------------------------- other users


@as_root
@pytest.mark.parametrize(("mode", "ends"), [(0o755, ["done", "quarantine"]), (0o775, ["done", "done"])])
def test_a_foreign_users_ticket_is_taken_where_the_mode_lets_others_write(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, mode: int, ends: list[str]
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    os.chown(Path(queue.root, "pending", token.name), FOREIGNER, FOREIGNER)
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    Path(queue.root).chmod(mode)
    run(StandIn())
    assert states(tmp_path) == ends
    if mode == 0o755:
        (failed,) = store.collect(tmp_path / "queue").failed
        assert f"belongs to user {FOREIGNER}" in failed.failure.message
        assert "chmod g+w" in failed.failure.message
        status = CliRunner().invoke(cli, ["status", "--config", str(config_file)], catch_exceptions=False)
        assert f"belongs to user {FOREIGNER}" in status.stdout


@as_root
def test_a_foreigner_can_leave_no_result_no_point_and_no_claim(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    """These are not looked at for their owner: where the mode lets others write nothing, nothing of theirs is there.

    A ticket is, since its file's owner is kept by a rename, whoever does it: what an owner of the queue moved or
    linked into it by mistake is told from what he wrote.
    """
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path("/tmp"):
            break
        directory.chmod(0o755)
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn())
    directories = [p for p in (tmp_path / "queue").rglob("*") if p.is_dir()] + [tmp_path / "queue"]
    assert len(directories) > 10
    for directory in directories:
        tried = subprocess.run(["touch", str(directory / "x")], user=FOREIGNER, group=FOREIGNER, capture_output=True)
        assert b"Permission denied" in tried.stderr, directory
