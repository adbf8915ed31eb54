"""A server that somebody else starts, here a stand-in that lists models on loopback."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.manifest import MegatronRecord
from eval_runner import registry
from eval_runner.checkpoints.base import Servable
from eval_runner.evaluators.base import Context, Limits
from eval_runner.process import Stopped
from eval_runner.servers import external
from eval_runner.servers.base import Endpoint, Running, Serving
from eval_runner.servers.external import ExternalServer
from eval_runner.servers.shared import Shared

NAME, OTHER = "checkpoint-5-0123456789abcdef", "checkpoint-4-fedcba9876543210"


@dataclass
class Fake:
    """What the stand-in says: a status, names (or any text), and what it was asked."""

    url: str = ""
    names: list[str] | str = field(default_factory=lambda: [NAME])
    status: int = 200
    key: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def fake() -> Iterator[Fake]:
    said = Fake()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.headers.get("Authorization")
            said.asked.append((self.path, key))
            status = 401 if said.key and key != f"Bearer {said.key}" else said.status
            text = said.names if isinstance(said.names, str) else json.dumps({"data": [{"id": n} for n in said.names]})
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{said.url}/elsewhere")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    said.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield said
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "POLL_S", 0.02)
    monkeypatch.setattr(external, "WATCH_S", 0.02)


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    checkpoint = Servable(tmp_path, tmp_path, lambda: None)
    return Serving(checkpoint, NAME, 5, tmp_path, tmp_path / "log", lambda: False, Limits())


@pytest.fixture
def start(fake: Fake, serving: Serving, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started = []

    def go(**settings: object) -> Running:
        started.append(build(tmp_path, {"url": fake.url, "start_timeout": 0.3} | settings).start(serving))
        return started[-1]

    yield go
    for running in started:
        running.close()


def build(tmp_path: Path, settings: dict[str, object]) -> ExternalServer:
    return ExternalServer(settings, Context(tmp_path, tmp_path, "server", "autoeval.yaml"))


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "autoeval.yaml: server.url: missing"),
        ({"url": "http://h", "urll": "x"}, "autoeval.yaml: server.urll: unknown key; did you mean 'url'?"),
        ({"url": "host:8000"}, "autoeval.yaml: server.url: 'host:8000' is no URL such as http://HOST:8000"),
        ({"url": "http://h:1/v1?x=1"}, "autoeval.yaml: server.url: 'http://h:1/v1?x=1' is no URL such as http://HOST:8000"),
        ({"url": "http://me:secret@h"}, "autoeval.yaml: server.url: holds a user or a password; name the variable that "
         "holds a key by `api_key_env`"),
        ({"url": "http://h", "start_timeout": 0, "api_key_env": ""},
         "autoeval.yaml: server.start_timeout: must be more than 0 seconds; autoeval.yaml: server.api_key_env: empty"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, settings)
    assert str(caught.value) == said


def test_a_key_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = build(tmp_path, {"url": "http://h", "api_key_env": "NO_SUCH_KEY"})
    with pytest.raises(ConfigError, match=r"server\.api_key_env: NO_SUCH_KEY is not set"):
        server.check()
    monkeypatch.setenv("NO_SUCH_KEY", "x")
    server.check()


def test_what_it_serves_and_is_known_by(tmp_path: Path, serving: Serving) -> None:
    server = build(tmp_path, {"url": "http://host:8000/v1/"})
    assert server.facts(serving.checkpoint) == {"server": "external", "server url": "http://host:8000"}
    assert server.serves(serving.checkpoint)
    assert not server.serves(replace(serving.checkpoint, megatron=MegatronRecord()))
    assert registry.get("servers", "external", "here") is ExternalServer


# ---------------------------------------------------------------------- the start


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_server_that_lists_the_name(start: Callable[..., Running], fake: Fake, end: str) -> None:
    running = start(url=fake.url + end)
    assert running.endpoint == Endpoint(fake.url, "openai", NAME)
    assert fake.asked[0] == ("/v1/models", None)
    assert running.failure() is None
    assert running.failure(1.0) is None


def test_a_key_goes_with_it(start: Callable[..., Running], fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "k3y"
    with pytest.raises(ConfigError, match=r"server\.api_key_env: .* answers 401: it asks for a key; name the variable"):
        start()
    monkeypatch.setenv("SERVER_KEY", "k3y")
    assert start(api_key_env="SERVER_KEY").endpoint.api_key_env == "SERVER_KEY"
    monkeypatch.setenv("SERVER_KEY", "wrong")
    with pytest.raises(ConfigError, match="answers 401: it asks for another key") as caught:
        start(api_key_env="SERVER_KEY")
    assert "wrong" not in str(caught.value)


def test_a_server_of_another_checkpoint_is_refused(start: Callable[..., Running], fake: Fake, tmp_path: Path) -> None:
    fake.names = [OTHER]
    with pytest.raises(ConfigError) as caught:
        start()
    assert str(caught.value) == (
        f"autoeval.yaml: server.url: after 0.3 s, {fake.url}/v1/models lists {OTHER}, not {NAME}; start it with "
        f"`--served-model-name {NAME}`, for {tmp_path}, or raise start_timeout"
    )
    fake.names = []
    with pytest.raises(ConfigError, match=f"lists no model, not {NAME}"):
        start()


def test_it_is_waited_for(
    start: Callable[..., Running], fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First it is away, then another's, then ours."""
    fake.status, fake.names = 503, [OTHER]
    threading.Timer(0.3, lambda: setattr(fake, "status", 200)).start()
    threading.Timer(0.6, lambda: setattr(fake, "names", [NAME])).start()
    began = time.monotonic()
    with caplog.at_level(logging.INFO, "autoeval"):
        assert start(start_timeout=30).failure() is None
    assert time.monotonic() - began >= 0.6
    (said,) = [record.message for record in caplog.records]     # once, and what to do
    assert "step 5 waits for its server: " in said
    assert f"start it with `--served-model-name {NAME}`" in said


def test_a_server_that_does_not_come(start: Callable[..., Running], fake: Fake) -> None:
    fake.status = 502
    with pytest.raises(AutoEvalError, match=r"after 0\.3 s, http://.*: answers 502; start it with") as caught:
        start()
    assert caught.value.kind == "transient"
    with pytest.raises(AutoEvalError, match=r"URLError.*refused") as caught:
        start(url="http://127.0.0.1:9")
    assert caught.value.kind == "transient"


@pytest.mark.parametrize(("status", "names", "said"), [
    (404, [NAME], "answers 404; name the URL below which /v1/models stands"),
    (302, [NAME], "answers 302"),
    (200, "<html>", r"answers with no list of models: b'<html>'"),
    (200, "[]", "answers with no list of models"),
])  # fmt: skip
def test_what_no_patience_mends(
    start: Callable[..., Running], fake: Fake, status: int, names: list[str] | str, said: str
) -> None:
    fake.status, fake.names = status, names
    with pytest.raises(ConfigError, match=said):
        start(start_timeout=600)
    assert [path for path, _ in fake.asked] == ["/v1/models"]       # no redirect is followed


def test_a_wait_heeds_that_it_is_to_stop(fake: Fake, serving: Serving, tmp_path: Path) -> None:
    fake.names = [OTHER]
    with pytest.raises(Stopped):
        build(tmp_path, {"url": fake.url}).start(replace(serving, stopping=lambda: len(fake.asked) > 2))


def test_a_checkpoint_that_changed_meanwhile(fake: Fake, serving: Serving, tmp_path: Path) -> None:
    def unchanged() -> None:
        raise CheckpointError("changed")

    serving = replace(serving, checkpoint=replace(serving.checkpoint, unchanged=unchanged))
    with pytest.raises(CheckpointError):
        build(tmp_path, {"url": fake.url}).start(serving)


# ---------------------------------------------------------------------- meanwhile


def failure(running: Running) -> AutoEvalError | None:
    """As an evaluator's child asks, again and again."""
    end = time.monotonic() + 20
    while (found := running.failure()) is None and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_a_server_that_is_swapped_in_mid_evaluation(start: Callable[..., Running], fake: Fake) -> None:
    running = start()
    fake.names = [OTHER]
    assert f"swapped in mid-evaluation: it lists {OTHER}, and {NAME} no more" in str(failure(running))


def test_a_server_that_is_away_for_a_moment(
    start: Callable[..., Running], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    fake.status = 503
    time.sleep(0.2)
    assert running.failure(1.0) is None
    monkeypatch.setattr(external, "AWAY_S", 0.1)
    assert "the server is gone: answers 503" in str(failure(running))


def test_a_swap_is_seen_at_the_end_at_the_latest(
    fake: Fake, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "WATCH_S", 600)
    with Shared(build(tmp_path, {"url": fake.url}), serving) as shared:
        with shared.answering():
            shared.endpoint()
        with pytest.raises(AutoEvalError, match="swapped in mid-evaluation"), shared.answering():
            fake.names = [OTHER]


def test_a_swap_after_the_release_is_nobodys_reason(fake: Fake, serving: Serving, tmp_path: Path) -> None:
    """But where the next evaluator needs the server again."""
    with Shared(build(tmp_path, {"url": fake.url}), serving) as shared:
        with shared.answering():
            shared.endpoint()
            shared.release(keep=True)
            fake.names = [OTHER]
            assert shared._running is not None
            failure(shared._running)
            assert not shared.stopping()
        with pytest.raises(AutoEvalError, match="swapped in mid-evaluation"), shared.answering():
            assert shared.stopping()


def test_nothing_is_asked_after_the_last_release(fake: Fake, serving: Serving, tmp_path: Path) -> None:
    with Shared(build(tmp_path, {"url": fake.url}), serving) as shared, shared.answering():
        shared.endpoint()
        shared.release(keep=False)
        time.sleep(0.1)
        before = len(fake.asked)
        time.sleep(0.2)
        assert len(fake.asked) == before


def test_a_swap_is_seen_at_the_release(
    fake: Fake, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "WATCH_S", 600)
    with Shared(build(tmp_path, {"url": fake.url}), serving) as shared:
        shared.endpoint()
        fake.names = [OTHER]
        with pytest.raises(AutoEvalError, match="swapped in mid-evaluation"):
            shared.release(keep=True)
        assert shared.stopping()


def test_nothing_is_asked_after_the_end(start: Callable[..., Running], fake: Fake) -> None:
    start().close()
    time.sleep(0.1)
    before = len(fake.asked)
    time.sleep(0.2)
    assert len(fake.asked) == before
