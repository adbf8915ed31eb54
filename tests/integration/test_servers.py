"""Servers as real process groups, under a real runner. The server program and the evaluator are stand-ins."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.manifest import MegatronRecord
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.checkpoints.base import Servable
from eval_runner.evaluators.base import Job, Limits, Outcome
from eval_runner.process import Stopped, reason
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Evaluation, Instance, Result, Score
from eval_runner.runner import Runner
from eval_runner.servers import launch, ports, shared
from eval_runner.servers.base import Endpoint, Serving
from eval_runner.servers.shared import Shared
from tests.processes import MARK, marked, wait_for

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "server_stand_in.py"
LAUNCHER = f"""#!/bin/sh
# a stand-in for an interpreter with torch: torch.distributed.run, which takes seconds, only starts the script
[ "$1" = -m ] && shift 8
exec {sys.executable} "$@"
"""
SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


def ask(endpoint: Endpoint, path: str) -> None:
    """A GET that need not be answered."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=20)
    try:
        connection.request("GET", path)
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()


def starts(log: Path) -> list[dict[str, object]]:
    """What each process of the server was started with, by its log."""
    lines = log.read_text().splitlines() if log.exists() else []
    decode = json.JSONDecoder().raw_decode
    return [decode(line.removeprefix("started "))[0] for line in lines if line.startswith("started ")]


# ---------------------------------------------------------------------- one server, started without a launcher


@dataclass
class Lab:
    """Starts the stand-in as `MegatronServer` would, and looks after what it leaves."""

    directory: Path
    mark: str
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def serving(self) -> Serving:
        record = Servable(self.directory, self.directory, lambda: None, megatron=MegatronRecord())
        return Serving(record, "model", 10, self.directory, self.log, self.stop.is_set, Limits(grace=0.3))

    def recipe(self, *modes: str, timeout: float = 60.0, probe: launch.Probe | None = None) -> launch.Recipe:
        return launch.Recipe(
            name="the stand-in",
            command=lambda chosen: [
                sys.executable, str(SCRIPT), "--load", "here", "--port", str(chosen[0]), "--stand-in", "", *modes,
            ],
            ports=1, env=os.environ | {MARK: self.mark},
            probe=probe or launch.Probe("PUT", "/api", '{"prompts": ["0"]}', good=lambda body: body.startswith(b"{")),
            api=lambda url: Endpoint(url, "megatron", "model"), timeout=timeout, remedy="; raise start_timeout",
        )  # fmt: skip

    def start(self, *modes: str, **options: object) -> launch.Process:
        return launch.start(self.recipe(*modes, **options), self.serving())  # type: ignore[arg-type]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, uuid.uuid4().hex)
    yield made
    made.stop.set()
    wait_for(lambda: marked(made.mark) == [])


def test_a_server_answers_and_is_gone_once_it_is_closed(lab: Lab) -> None:
    server = lab.start()
    assert len(marked(lab.mark)) >= 3       # supervisor, server, and its child in a session of its own
    assert server.failure() is None
    ask(server.endpoint, "/v1/health")
    server.close()
    server.close()
    assert marked(lab.mark) == []
    assert server.failure() is None         # we ended it


def test_a_server_that_ends_before_it_answers_says_why(lab: Lab) -> None:
    with pytest.raises(AutoEvalError) as caught:
        lab.start("fails")
    assert str(caught.value) == (
        f"the stand-in ended before it answered: RuntimeError: size mismatch for embedding; log: {lab.log}"
    )
    assert caught.value.kind == "transient"
    with pytest.raises(AutoEvalError, match=r"ended before it answered: killed by signal 9 \(SIGKILL: out of memory\?"):
        lab.start("killed")


def test_what_no_other_try_mends_is_a_mistake_in_the_configuration(lab: Lab) -> None:
    recipe = lab.recipe()
    argv = [sys.executable, "-c", "import no_such_module_anywhere"]
    with pytest.raises(ConfigError, match="No module named 'no_such_module_anywhere'"):
        launch.start(launch.Recipe(**{**vars(recipe), "command": lambda chosen: argv}), lab.serving())
    argv = [str(lab.directory / "nowhere")]
    with pytest.raises(AutoEvalError, match=r"the stand-in cannot be run: .*/nowhere: No such file"):
        launch.start(launch.Recipe(**{**vars(recipe), "command": lambda chosen: argv}), lab.serving())


@pytest.mark.parametrize("mode", ["never", "deaf", "hangs"])
def test_a_server_that_never_answers_is_ended(lab: Lab, mode: str) -> None:
    began = time.monotonic()
    with pytest.raises(AutoEvalError, match=r"did not answer within 2\.5 s; raise start_timeout; it wrote last: start"):
        lab.start(mode, timeout=2.5)
    assert time.monotonic() - began < 30
    assert marked(lab.mark) == []


@pytest.mark.parametrize("mode", ["never", "hangs"])
def test_a_start_heeds_that_it_is_to_stop(lab: Lab, mode: str) -> None:
    threading.Timer(1.5, lab.stop.set).start()
    with pytest.raises(Stopped):
        lab.start(mode)
    assert marked(lab.mark) == []


def test_an_answer_that_no_patience_mends(lab: Lab) -> None:
    with pytest.raises(AutoEvalError, match=r"answers PUT /api with status 500: .*Internal.*\(ValueError: no such tok"):
        lab.start("refuses")
    with pytest.raises(AutoEvalError, match=r'answers PUT /api with status 200: "prompts argument required"'):
        lab.start("text")
    with pytest.raises(AutoEvalError, match="answers GET /other with status 404"):
        lab.start(probe=launch.Probe("GET", "/other"))


@pytest.mark.parametrize("what", ["/exit", "/kill", "/closes"])
def test_a_server_that_dies_is_known_to(lab: Lab, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MISSING_S", 1.0)
    server = lab.start()
    ask(server.endpoint, what)
    failure = server.failure(wait=30)
    assert failure is not None
    said = {
        "/exit": "ended in mid-evaluation: RuntimeError: the engine is gone",
        "/kill": "ended in mid-evaluation: killed by signal 9 (SIGKILL: out of memory?",
        "/closes": "listens no more",
    }[what]
    assert said in str(failure)
    assert str(lab.log) in str(failure)
    assert failure.kind == "transient"
    server.close()
    assert marked(lab.mark) == []


# ---------------------------------------------------------------------- whose port it is


@pytest.fixture
def foreign() -> Iterator[int]:
    """The port of a server of somebody else, which answers as ours would: a stale one, or another user's."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"text": ["wrong"]}')

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_another_port_is_tried_where_one_is_taken(lab: Lab, foreign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    others, free = iter([foreign]), ports.free
    monkeypatch.setattr(ports, "free", lambda count: [next(others, None) or free(1)[0]])
    server = lab.start()
    assert server.endpoint.url != f"http://127.0.0.1:{foreign}"
    server.close()


@pytest.mark.parametrize("mode", ["", "never"])
def test_a_port_that_another_program_answers_at_is_refused(
    lab: Lab, foreign: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server sees that it is taken and ends, or does not listen at all: nobody else speaks for it."""
    monkeypatch.setattr(ports, "free", lambda count: [foreign])
    with pytest.raises(AutoEvalError, match=rf"port {foreign} is in use by another program.*tried with 3 ports"):
        lab.start(mode)
    assert marked(lab.mark) == []


def test_the_second_port_may_not_be_anothers_either(lab: Lab, foreign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ports.free
    monkeypatch.setattr(ports, "free", lambda count: [free(1)[0], foreign])
    with pytest.raises(AutoEvalError, match=f"port {foreign} is in use by another program"):
        lab.start()


def test_an_address_in_use_that_only_the_log_tells(lab: Lab) -> None:
    code = "raise OSError(98, 'Address already in use')"
    recipe = launch.Recipe(**{**vars(lab.recipe()), "command": lambda chosen: [sys.executable, "-c", code]})
    with pytest.raises(AutoEvalError, match="is in use by another program of this host; tried with 3 ports"):
        launch.start(recipe, lab.serving())
    assert lab.log.read_text().count("Address already in use") >= 3


# ---------------------------------------------------------------------- under a runner


@dataclass
class Asker:
    """An evaluator that asks the server; `during` is what happens meanwhile. `direct` has it raise what it likes."""

    during: Callable[[Job, Endpoint], None] = lambda job, endpoint: None
    jobs: list[Job] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    asks: bool = True
    name: str = "asked"

    def check(self) -> None: ...

    def evaluate(self, job: Job) -> Outcome:
        self.jobs.append(job)
        if self.asks:
            assert job.endpoint is not None
            endpoint = job.endpoint()
            self.urls.append(endpoint.url)
            connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"))
            connection.request("PUT", "/api", json.dumps({"prompts": ["a"]}))
            assert json.loads(connection.getresponse().read()) == {"text": ["a!"]}
            connection.close()
            self.during(job, endpoint)
        score = Score(self.name, "em", "test", 1.0, n=1)
        values = [Instance(self.name, "em", "test", "0", 1.0)]
        return Outcome(Evaluation("asker", 0.1, (score,), versions=job.facts | job.server_facts), values)


CONFIG = """
queue: queue
run: {{tokenizer: tokenizer}}
runner: {{lease: 6.0, allow_pickled_weights: true, max_attempts: {attempts}}}
suites: {{quick: {{evaluators: [{{type: helm, entries: [a]}}, {{type: helm, entries: [b]}}]}}}}
server: {{type: megatron, checkout: checkout, script: {script}, mode: static, python: {python}{more}}}
sinks: []
"""


@dataclass
class Site:
    """A queue with one ticket for a checkpoint of Megatron's, whose content is made up, and a configuration."""

    directory: Path
    mark: str

    @property
    def file(self) -> Path:
        return self.directory / "autoeval.yaml"

    @property
    def queue(self) -> Path:
        return self.directory / "queue"

    @property
    def log(self) -> Path:
        (found,) = self.queue.glob("logs/*.server.log")
        return found

    def configure(self, more: str = "", *, attempts: int = 1, python: str = "./launcher") -> None:
        self.file.write_text(CONFIG.format(script=SCRIPT, more=more, attempts=attempts, python=python))

    def run(self, *evaluators: Asker, mode: str = "drain") -> Runner:
        config = configs.load(str(self.file))
        server = registry.build_server(config)
        assert server is not None
        server.check()
        for i, evaluator in enumerate(evaluators):
            evaluator.name = f"asked{i}"
        with Progress() as progress:
            runner = Runner(config, {"quick": list(evaluators)}, {}, progress, name="r1", server=server)
            runner.run(mode)  # type: ignore[arg-type]
        return runner

    def failure(self) -> str:
        (path,) = (self.queue / "results").iterdir()
        failure = store.read(path).failure
        assert failure is not None
        return f"{failure.kind}: {failure.message}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path, uuid.uuid4().hex)
    monkeypatch.setenv(MARK, made.mark)
    monkeypatch.setattr("eval_runner.runner.RETRY_S", 0.01)
    monkeypatch.setattr(launch, "MISSING_S", 1.0)
    package = tmp_path / "checkout" / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "package_info.py").write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\n")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    save = tmp_path / "out" / "iter_0000010"
    save.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "common.pt"):
        (save / name).write_text(name)
    (save / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (tmp_path / "launcher").write_text(LAUNCHER)
    (tmp_path / "launcher").chmod(0o755)
    made.configure()
    submit(save, step=10, config=made.file)
    yield made
    wait_for(lambda: [pid for pid in marked(made.mark) if pid != os.getpid()] == [])


def result(site: Site) -> Result:
    (found,), _ = store.done(site.queue)
    return found


def test_one_server_is_started_for_all_evaluators_of_a_ticket(site: Site) -> None:
    first, second = Asker(), Asker()
    assert site.run(first, second).done == 1
    assert first.urls == second.urls
    (start,) = starts(site.log)
    argv = start["argv"]
    assert isinstance(argv, list)
    load = argv[argv.index("--load") + 1]
    assert argv[: argv.index("--port")] == [
        "--load", load, "--ckpt-step", "10", "--use-checkpoint-args", "--micro-batch-size", "1"
    ]  # fmt: skip
    assert argv[argv.index("--port") + 2 :] == [
        "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--ckpt-format", "torch_dist",
    ]  # fmt: skip
    assert site.log.name.startswith(next(iter(os.listdir(site.queue / "results"))).partition(".")[0])
    (job,) = first.jobs
    assert job.server_facts["server"] == "megatron static"
    assert (job.loadable, job.step, job.facts) == (False, 10, {})
    assert result(site).evaluations[0].versions["megatron"] == "0.19.2"
    assert job.max_length is None       # nobody said how many tokens fit
    assert job.digest == result(site).checkpoint_digest
    assert job.tokenizer == site.directory / "tokenizer"


def test_no_server_is_started_where_nobody_asks(site: Site) -> None:
    quiet = Asker(asks=False)
    assert site.run(quiet, Asker(asks=False)).done == 1
    assert list(site.queue.glob("logs/*.server.log")) == []
    assert quiet.jobs[0].server_facts["server"] == "megatron static"       # known all the same: part of a resume key


def test_a_checkpoint_that_evaluators_load_is_not_served(site: Site, checkpoint: Callable[..., Path]) -> None:
    submit(checkpoint(20), step=20, config=site.file)
    loading = Asker(asks=False)
    assert site.run(loading, Asker(asks=False)).done == 2
    jobs = {Path(job.path).name: job for job in loading.jobs}
    assert jobs.pop("load").endpoint is not None
    (job,) = jobs.values()
    assert (job.endpoint, job.facts, job.server_facts, job.max_length) == (None, {}, {}, None)
    assert (job.loadable, job.step) == (True, 20)


def test_a_server_of_two_processes(site: Site) -> None:
    """With torch's real launcher, as all of them are started."""
    site.configure(", tensor_parallel: 2", python=sys.executable)
    assert site.run(Asker(), Asker(asks=False)).done == 1
    assert sorted(s["rank"] for s in starts(site.log)) == [0, 1]  # type: ignore[type-var]


def test_a_worker_that_is_killed_is_told_through_the_launcher(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's launcher ends with status 1 and a table; the reason is in it."""
    monkeypatch.setattr(launch, "MISSING_S", 30.0)      # the launcher may be slow to see it on a busy machine
    monkeypatch.setattr(shared, "SETTLE_S", 60.0)
    site.configure(", tensor_parallel: 2", python=sys.executable)

    def during(job: Job, endpoint: Endpoint) -> None:
        ask(endpoint, "/kill")
        raise AutoEvalError("HELM failed: connection refused")

    site.run(Asker(during), Asker())
    assert site.failure() == (
        f"transient: Megatron's static server ended in mid-evaluation: rank 0 was {reason(-9)}; log: {site.log}"
    )


@pytest.mark.parametrize("how", ["stopping", "error", "other error", "nothing"])
def test_a_server_that_dies_in_mid_evaluation_is_the_reason(site: Site, how: str) -> None:
    """Whatever the evaluator makes of it: it is told to stop, fails, or does not even notice."""
    seen: list[bool] = []

    def during(job: Job, endpoint: Endpoint) -> None:
        ask(endpoint, "/exit")
        if how == "error":
            raise AutoEvalError("HELM failed: connection refused")
        if how == "other error":
            raise ConnectionRefusedError(111, "Connection refused")
        if how == "stopping":
            try:
                job.run(SLEEP, env=None)
            finally:
                seen.append(job.stopping())
        if how == "nothing":
            wait_for(job.stopping)

    runner = site.run(Asker(), Asker(during))       # the last one, after which nobody else would see it
    assert (runner.done, runner.failed) == (0, 1)
    assert site.failure() == (
        "transient: Megatron's static server ended in mid-evaluation: RuntimeError: the engine is gone; "
        f"log: {site.log}"
    )
    assert seen == ([True] if how == "stopping" else [])


def test_a_server_that_was_released_is_nobodys_reason(site: Site) -> None:
    """It goes on for the next evaluator; the last goes on without it."""
    alive: list[list[int]] = []

    def during(job: Job, endpoint: Endpoint) -> None:
        job.release()
        alive.append([pid for pid in marked(site.mark) if pid != os.getpid()])
        assert job.run([sys.executable, "-c", "pass"], env=None) == 0

    first, second = Asker(during), Asker(during)
    assert site.run(first, second).done == 1
    assert first.urls == second.urls
    assert [pids != [] for pids in alive] == [True, False]


def test_the_end_of_a_server_that_was_released_changes_nothing(site: Site) -> None:
    def during(job: Job, endpoint: Endpoint) -> None:
        job.release()
        ask(endpoint, "/exit")
        wait_for(lambda: [pid for pid in marked(site.mark) if pid != os.getpid()] == [])
        assert not job.stopping()
        assert job.run([sys.executable, "-c", "pass"], env=None) == 0

    runner = site.run(Asker(during), Asker())
    assert (runner.done, runner.failed) == (0, 1)       # the second one needed it
    assert "RuntimeError: the engine is gone" in site.failure()
    assert len(starts(site.log)) == 1


def test_a_server_that_died_is_started_again_for_the_next_attempt(site: Site) -> None:
    site.configure(attempts=3)
    died: list[Path] = []

    def during(job: Job, endpoint: Endpoint) -> None:
        if not died:
            died.append(site.log)
            ask(endpoint, "/kill")
            job.run(SLEEP, env=None)

    assert site.run(Asker(during), Asker()).done == 1
    assert len(list(site.queue.glob("logs/*.server.log"))) == 2


def test_an_evaluator_that_fails_by_itself_is_the_reason(site: Site) -> None:
    def during(job: Job, endpoint: Endpoint) -> None:
        raise AutoEvalError("no good answer")

    began = time.monotonic()
    site.run(Asker(during), Asker())
    assert site.failure() == "transient: no good answer"
    assert time.monotonic() - began < 60


def test_a_server_that_cannot_start_fails_the_attempt(site: Site) -> None:
    site.configure(", arguments: [--stand-in, fails]")
    site.run(Asker(), Asker())
    assert site.failure() == (
        "transient: Megatron's static server ended before it answered: RuntimeError: size mismatch for embedding; "
        f"log: {site.log}"
    )


def test_the_servers_log_holds_no_secret(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_API_KEY", "s3cret-of-the-host")
    monkeypatch.setenv("PLANTED_DSN", "s3cret-of-the-server")       # only where it stands says that it is one
    site.configure(", arguments: [--say, 's3cret-of-the-host and ${PLANTED_DSN}']")
    site.run(Asker(), Asker())
    text = site.log.read_text()
    assert "s3cret" not in text
    assert "*** and ***" in text
    (written,) = (site.queue / "results").rglob("result.json")
    assert "s3cret" not in written.read_text()


def test_a_checkpoint_that_nothing_serves(site: Site) -> None:
    text = site.file.read_text()
    site.file.write_text("".join(line for line in text.splitlines(True) if not line.startswith("server:")))
    config = configs.load(str(site.file))
    assert registry.build_server(config) is None
    shutil.rmtree(site.directory / "out")       # it is said before any file is read
    with Progress() as progress:
        Runner(config, {"quick": [Asker(), Asker()]}, {}, progress).run("drain")
    assert site.failure() == (
        f"configuration: {site.file}: nothing here serves or converts checkpoints of Megatron-LM such as "
        f"{site.directory}/out/iter_0000010; add `server: {{type: megatron, checkout: DIRECTORY OF MEGATRON-LM}}`, "
        "or `convert: {command: [PROGRAM, ARGUMENT…]}`"
    )


@pytest.mark.parametrize("fault", [None, AutoEvalError("no good answer"), SystemExit(143)])
def test_the_server_is_ended_after_the_last_evaluator(lab: Lab, fault: BaseException | None) -> None:
    class Fake:
        def start(self, serving: Serving) -> launch.Process:
            return lab.start()

    def work() -> None:
        with Shared(Fake(), lab.serving()) as served, served.answering():  # type: ignore[arg-type]
            served.endpoint()
            assert marked(lab.mark) != []
            if fault is not None:
                raise fault

    with contextlib.nullcontext() if fault is None else pytest.raises(type(fault)):
        work()
    assert marked(lab.mark) == []


def test_stopping_comes_before_the_servers_end(lab: Lab) -> None:
    """The attempt ends the server when it must stop; what an evaluator makes of that is no failure."""

    def fail() -> None:
        lab.stop.set()
        wait_for(lambda: marked(lab.mark) == [])
        raise AutoEvalError("connection refused")

    class Fake:
        def start(self, serving: Serving) -> launch.Process:
            return lab.start()

    with Shared(Fake(), lab.serving()) as served:  # type: ignore[arg-type]
        served.endpoint()
        with pytest.raises(Stopped, match="connection refused"), served.answering():
            fail()


def test_a_start_that_failed_is_not_tried_again_for_the_next_evaluator(lab: Lab) -> None:
    tries = []

    class Fake:
        def start(self, serving: Serving) -> launch.Process:
            tries.append(serving)
            raise AutoEvalError("no luck")

    with Shared(Fake(), lab.serving()) as served:  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(AutoEvalError, match="no luck"), served.answering():
                served.endpoint()
        with pytest.raises(AutoEvalError, match="no luck"), served.answering():
            pass        # an evaluator that swallowed it
    assert len(tries) == 1
    assert shared.SETTLE_S > launch.MISSING_S + 2 * launch.WATCH_S      # else a dying server is not waited for


# ---------------------------------------------------------------------- signals to a real runner

RUNNER = """
import sys
from eval_runner import config, registry
from eval_runner.progress import Progress
from eval_runner.runner import Runner, stopped_by_signals

class Sleeper:
    def check(self): ...
    def evaluate(self, job):
        job.endpoint()
        open("ready", "w").close()
        job.run([sys.executable, "-c", "import time; time.sleep(300)"], env=None)

loaded = config.load(sys.argv[1])
with Progress() as progress:
    runner = Runner(loaded, {"quick": [Sleeper(), Sleeper()]}, {}, progress, server=registry.build_server(loaded))
    with stopped_by_signals(runner):
        runner.run("forever")
"""


@pytest.fixture
def start(site: Site, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a runner, and wait until its server answers and its evaluator is at work."""
    started = []

    def go() -> subprocess.Popen[bytes]:
        (tmp_path / "tmp").mkdir()
        env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(site.file)], env=env, cwd=tmp_path)
        started.append(runner)
        wait_for((tmp_path / "ready").exists)
        return runner

    yield go
    for runner in started:
        runner.kill()
        runner.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_no_server_outlives_its_runner_or_its_standing_still(
    site: Site, start: Callable[[], subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    runner = start()
    wait_for(lambda: len(marked(site.mark)) >= 6)       # runner, two supervisors, evaluator, server and its child
    runner.send_signal(number)
    wait_for(lambda: set(marked(site.mark)) <= {runner.pid})
    if number is signal.SIGTERM:
        assert runner.wait(60) == 0
        (token,) = Queue(str(site.queue)).tokens()
        assert (token.state, token.failures) == ("pending", 0)
        assert os.listdir(site.directory / "tmp") == []
    if number is signal.SIGSTOP:
        runner.kill()


def test_a_lease_that_is_lost_ends_the_server(site: Site, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    runner = start()
    queue = Queue(str(site.queue), runner="other")
    (token,) = queue.tokens("claimed")
    assert queue.cancel(token, "a test")
    wait_for(lambda: set(marked(site.mark)) <= {runner.pid})
