"""`autoeval-runner doctor` over real queues; evaluators and GPUs are stand-ins."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks import submit
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.findings import Finding
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import breaker, doctor, registry
from eval_runner import config as configs
from eval_runner.cli import cli
from eval_runner.runner import Runner
from eval_runner.sinks import wandb_doctor
from tests.stand_ins import StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]
Examine = Callable[[], list[Finding]]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "WATCH_S", 0.3)
    monkeypatch.setattr(doctor, "DEADLINE_S", 60.0)
    monkeypatch.setattr(registry, "build_evaluators", lambda config, suite: [StandIn()])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def examine(config_file: Path) -> Examine:
    return lambda: doctor.examine(configs.load(str(config_file)))


def of(findings: list[Finding], what: str) -> Finding:
    (found,) = (f for f in findings if f.what == what)
    return found


def problems(findings: list[Finding]) -> list[str]:
    return [f.what for f in findings if f.level == "problem"]


def test_a_healthy_place(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, examine: Examine
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn())
    before = sorted(tmp_path.rglob("*"))
    started = time.monotonic()
    found = examine()
    assert time.monotonic() - started < 30      # 1 s on a quiet machine
    assert problems(found) == []
    assert of(found, "tickets").means == "1 done"
    assert of(found, "runners").means == "none is alive, and no ticket waits"
    assert "by hardlink" in of(found, "pins").means or "by reflink" in of(found, "pins").means
    assert of(found, "suites.quick").level == "ok"
    assert sorted(tmp_path.rglob("*")) == before
    done = CliRunner().invoke(cli, ["doctor", "--config", str(config_file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "ok       hard links: work" in done.stdout
    assert "0 problem(s)" in done.stderr


def test_a_problem_is_an_exit_status(config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(config_file.read_text() + "path_map: {/train: /not/there}\n")
    done = CliRunner().invoke(cli, ["doctor", "--json", "--config", str(config_file)], catch_exceptions=False)
    assert done.exit_code == 1
    data = json.loads(done.stdout)
    assert data["problems"] == 1
    (found,) = (f for f in data["findings"] if f["level"] == "problem")
    assert found["what"] == "path_map./train"
    assert "no such directory" in found["means"]
    assert found["do"]
    assert not (tmp_path / "queue").exists()        # looking makes no queue


# ---------------------------------------------------------------------- runners and tickets


def test_a_runner_that_died_with_a_ticket(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, examine: Examine
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    dead = Queue(str(tmp_path / "queue"), runner="dead")
    dead.beat(dead.start_heart(), 1)
    assert dead.claim() is not None
    found = of(examine(), "runner dead")
    assert (found.level, found.means) == ("ok", "is alive and holds 1 ticket(s)")      # it beat a moment ago
    now = os.stat(tmp_path / "queue").st_mtime
    os.utime(tmp_path / "queue" / "hb" / "dead", (now - 500, now - 500))
    found = of(examine(), "runner dead")
    assert found.level == "problem"
    assert "has not shown itself for 50" in found.means
    assert "takes the ticket over after 6 s" in found.do
    (tmp_path / "queue" / "hb" / "dead").unlink()
    assert "has no heartbeat and holds 1" in of(examine(), "runner dead").means


def test_a_runner_that_is_seen_to_beat(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock of the file server says."""
    submit(checkpoint(100), step=100, config=config_file)
    alive = Queue(str(tmp_path / "queue"), runner="alive")
    fd = alive.start_heart()
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(0.05):
            alive.beat(fd, count := count + 1)

    monkeypatch.setattr(doctor, "WATCH_S", 30.0)
    monkeypatch.setattr(doctor, "_age", lambda path, now: 1e6)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        found = examine()
    finally:
        over.set()
        thread.join()
    assert of(found, "runner alive").means == "is alive and holds nothing"
    assert [f for f in found if f.what == "runners"] == []      # the ticket that waits has a runner


def test_tickets_that_nobody_takes(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, examine: Examine
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    found = examine()
    assert of(found, "runners").means == "none is alive, and 1 ticket(s) wait"
    assert problems(found) == []
    config_file.write_text(config_file.read_text().replace("quick:", "other:"))
    found = examine()
    assert "has no such suite" in of(found, "suite quick").means
    assert "cancel --suite quick" in of(found, "suite quick").do
    (tmp_path / "queue" / "pending" / f"0-1-{'a' * 64}~g0f0").write_text("torn")
    assert any(f.means == "1 pending will be refused" for f in examine())


def test_what_failed_and_what_is_stopped(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, examine: Examine
) -> None:
    for step in (100, 200):
        submit(checkpoint(step, f"{step}".encode()), step=step, config=config_file)
    run(StandIn([CheckpointError("it is broken"), CheckpointError("it is broken")]))
    found = of(examine(), "2 ticket(s)")
    assert (found.level, found.means) == ("warning", "failed: it is broken")
    assert "autoeval-runner retry" in found.do
    digest = configs.load(str(config_file)).suites["quick"].digest
    (tmp_path / "queue" / breaker.FOLDER).mkdir(exist_ok=True)
    record = breaker.Record("quick", digest, ("a", "b", "c"), True, 0, "no GPU")
    (tmp_path / "queue" / breaker.FOLDER / f"{digest}.json").write_text(json.dumps(asdict(record)))
    found = of(examine(), "suite quick")
    assert found.level == "problem"
    assert "stopped, since it failed on 3" in found.means


def test_checkpoints_that_cannot_be_seen_from_here(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, examine: Examine
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    assert of(examine(), "checkpoints").level == "ok"
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    ticket = queue.read(token)
    moved = replace(ticket.manifest, path=f"/train{ticket.manifest.path}")
    there = replace(ticket, pin=f"/train{ticket.pin}", manifest=moved)
    Path(queue.root, "pending", token.name).write_bytes(tickets.dump(there))
    found = of(examine(), "checkpoints")
    assert found.level == "problem"
    assert "1 of 1 that wait cannot be seen from here, such as /train/" in found.means
    assert "path_map" in found.do
    config_file.write_text(config_file.read_text() + "path_map: {/train: /}\n")
    assert of(examine(), "checkpoints").level == "ok"


# ---------------------------------------------------------------------- this host


def test_evaluators_that_lack_something(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: StandIn) -> None:
        raise ConfigError("the helm environment is not built; run `autoeval-runner env create helm`")

    monkeypatch.setattr(StandIn, "check", check)
    found = of(examine(), "suites.quick")
    assert found.level == "problem"
    assert "env create helm" in found.means


def test_one_that_takes_long_keeps_nobody_waiting(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(StandIn, "check", lambda self: over.wait(120))
    monkeypatch.setattr(doctor, "DEADLINE_S", 3.0)
    started = time.monotonic()
    found = examine()
    over.set()
    assert time.monotonic() - started < 60
    assert of(found, "evaluators").level == "warning"
    assert "is still being looked at after 3 s" in of(found, "evaluators").means


def test_a_part_that_breaks_leaves_the_others(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: 1 // 0)
    found = examine()
    assert "ZeroDivisionError" in of(found, "GPU").means
    assert of(found, "suites.quick").level == "ok"


@pytest.mark.parametrize(("kind", "name", "level"), [("evaluators", "helm", "problem"), ("sinks", "wandb", "warning")])
def test_a_broken_plugin(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, level: str
) -> None:
    real = registry.get

    def get(kind_: Any, name_: str, where: str) -> Any:
        if (kind_, name_) == (kind, name):
            raise ConfigError(f"{where}: {name!r} of x 1 cannot be loaded (ImportError: no y); install what it lacks")
        return real(kind_, name_, where)

    monkeypatch.setattr(registry, "get", get)
    found = of(examine(), f"{kind[:-1]} {name}")
    assert found.level == level     # the configuration names helm, and no sink
    assert found.means.startswith(f"{name!r} of x 1 cannot be loaded")


@pytest.mark.parametrize(
    ("script", "level", "says"),
    [
        ("echo 'H100, 70000 MiB, 81559 MiB'", "ok", "H100, 70000 MiB"),
        ("echo no driver >&2; exit 9", "warning", "no driver"),
    ],
)
def test_gpus(
    tmp_path: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch, script: str, level: str, says: str
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    found = of(examine(), "GPU")
    assert found.level == level
    assert says in found.means


# ---------------------------------------------------------------------- W&B


@pytest.fixture
def service() -> Iterator[str]:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ONLINE = RunIdentity("id", wandb_id="w", wandb_mode="online")


def wandb(settings: dict[str, Any], *runs: RunIdentity) -> list[tuple[str, str]]:
    return [(f.level, f.means) for f in wandb_doctor.findings(settings, "sinks[0]", runs)][1:]


def test_a_key_is_found_and_never_shown(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"base_url": service}
    (no_key, answers) = wandb(settings, ONLINE)
    assert no_key[0] == "warning"
    assert "no key for" in no_key[1]
    assert answers == ("ok", f"{service} answers")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-one")
    assert wandb(settings, ONLINE)[0] == ("ok", "a key is in the environment, as WANDB_API_KEY")
    monkeypatch.setenv("OTHER", "s3cret-two")
    assert wandb(settings | {"api_key_env": "OTHER"}, ONLINE)[0] == ("ok", "a key is in the environment, as OTHER")
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password s3cret-three\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb(settings, ONLINE)[0] == ("ok", f"a key is in {netrc}")
    netrc.write_text("torn s3cret-four")
    found = wandb(settings, ONLINE)[0]
    assert found[0] == "warning"
    assert "s3cret" not in found[1]


def test_a_service_that_is_away_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-one")
    found = wandb({"base_url": "http://127.0.0.1:9"}, ONLINE)[-1]
    assert found[0] == "warning"
    assert "does not answer from here" in found[1]
    assert wandb({"base_url": "no url"}, ONLINE)[-1][0] == "warning"


def test_offline_runs_need_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_doctor, "_service", lambda *a: pytest.fail("the network was used"))
    assert wandb({}, replace(ONLINE, wandb_mode="offline"), RunIdentity("none"))[0][0] == "ok"


def test_runs_that_report_elsewhere(service: str) -> None:
    found = wandb({"base_url": service}, replace(ONLINE, wandb_base_url="https://wandb.example"))
    assert any("runs report to https://wandb.example" in means for _, means in found)


def test_no_network_without_a_service(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *a: asked.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a))
    assert problems(examine()) == []        # sinks: []
    assert asked == []


def test_a_sink_that_cannot_be_built(examine: Examine, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_doctor, "_service", lambda where, url: Finding("ok", where, "answers"))
    config_file.write_text(config_file.read_text().replace("sinks: []", "sinks: [{type: wandb, api_key_env: NOT_SET}]"))
    found = of(examine(), "sinks")
    assert found.level == "problem"
    assert "the environment has no NOT_SET" in found.means
