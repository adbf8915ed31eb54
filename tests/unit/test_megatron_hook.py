"""The hook around stand-ins for Megatron's modules, which do what it does in the order in which it does it.

The real `megatron.training` is in tests/megatron.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import delivery, manifest, megatron_training, pin
from autoeval_hooks import megatron as hook
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.megatron_record import record, samples_at, with_tokenizer_files
from autoeval_hooks.megatron_training import Training
from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket
from tests import megatron_layouts as layouts
from tests.unit.test_imports import FORBIDDEN, modules_after

ROOT = Path(__file__).parents[2]


class Megatron:
    """What the hook knows of Megatron: five functions in four modules, and the arguments. `events` is what the
    originals did. `retain` is --save-retain-interval, without an interval: each save deletes the one before it."""

    def __init__(self, save_dir: Path, **arguments: Any) -> None:
        self.args = argparse.Namespace(
            rank=0, world_size=1, save=str(save_dir), load=None, iteration=0, train_iters=100, consumed_train_samples=0,
            async_save=False, ckpt_convert_format=None, ckpt_format="torch_dist", seq_length=8, global_batch_size=4,
            autoeval_config=None,
        )  # fmt: skip
        vars(self.args).update(arguments)
        if self.args.iteration and "consumed_train_samples" not in arguments:
            self.args.consumed_train_samples = self.args.iteration * self.args.global_batch_size
        self.events: list[Any] = []
        self.retain = False
        self.write: Callable[[Path], Any] = layouts.torch_dist
        self._pending: list[tuple[Path, int]] = []
        self._last: Path | None = None
        self.modules = {name: types.ModuleType(name) for name in (
            "megatron", "megatron.core", "megatron.training", "megatron.training.arguments",
            "megatron.training.global_vars", "megatron.training.wandb_utils", "megatron.training.checkpointing",
            "megatron.training.training",
        )}  # fmt: skip
        self.core, self.arguments, self.wandb_utils, self.checkpointing, self.training = (
            self.modules[f"megatron.{name}"]
            for name in ("core", "training.arguments", "training.wandb_utils", "training.checkpointing",
                         "training.training")
        )  # fmt: skip
        self.core.__version__ = "0.19.2"  # type: ignore[attr-defined]
        self.modules["megatron.training.global_vars"].get_args = lambda: self.args  # type: ignore[attr-defined]
        for module, name, function in (
            (self.arguments, "add_megatron_arguments", lambda parser: parser),
            (self.wandb_utils, "on_save_checkpoint_success", self._succeeded),
            (self.checkpointing, "save_checkpoint", self._save),
            (self.training, "save_checkpoint", self._save),
            (self.training, "training_log", self._log),
            (self.training, "train", self._train),
        ):
            setattr(module, name, lambda *a, _f=function, **k: _f(*a, **k))
        self.training.training_log = self._log  # type: ignore[attr-defined]  # with its signature
        self.steps: Callable[[], Any] = lambda: None

    def run(self, steps: Callable[[], Any]) -> Any:
        """Train: `steps` is what happens inside."""
        self.steps = steps
        return self.training.train("forward_step")

    def step(self, iteration: int) -> None:
        self.args.consumed_train_samples = iteration * self.args.global_batch_size
        self.training.training_log({}, {}, 0.1, iteration, 1.0)

    def save(self, iteration: int, *, path: str = "", directory: str = "", **options: Any) -> None:
        self.args.consumed_train_samples = iteration * self.args.global_batch_size
        self._where = path or f"iter_{iteration:07d}", directory or self.args.save
        self.training.save_checkpoint(iteration, "model", "optimizer", **options)

    def finalize(self) -> None:
        """What asynchronous saves wait for."""
        while self._pending:
            self._complete(*self._pending.pop(0))

    def _save(self, iteration: int, *_: Any, **__: Any) -> None:
        name, directory = self._where
        path = Path(directory) / name
        if self.args.async_save:
            self._pending.append((path, iteration))
        else:
            self._complete(path, iteration)

    def _complete(self, path: Path, iteration: int) -> None:
        self.write(path)
        if self.retain and self._last is not None:
            os.rename(self._last, f"{self._last}.deleted")
        self._last = path
        named = path / "mp_rank_00" / "model_optim_rng.pt" if self.args.ckpt_format == "torch" else path
        self.wandb_utils.on_save_checkpoint_success(str(named), "tracker", str(path.parent), iteration)

    def _succeeded(self, checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int) -> str:
        self.events.append(("succeeded", iteration))
        return "their answer"

    def _log(self, loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *_: Any) -> bool:
        self.events.append(("log", iteration))
        return True

    def _train(self, *_: Any) -> tuple[Any, int]:
        return self.steps(), 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        "queue: queue\nhook: {deadline: 2.0}\nsuites:\n  quick: {evaluators: [{type: helm, entries: [a]}]}\n"
        "  slow: {every_steps: 4, evaluators: [{type: helm, entries: [b]}]}\n"
    )
    return path


@pytest.fixture
def start(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Megatron]:
    """A new process with Megatron, its arguments parsed."""
    monkeypatch.setattr(hook.atexit, "register", lambda *a: None)
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.05)
    monkeypatch.delenv(hook.VARIABLE, raising=False)

    def make(**arguments: Any) -> Megatron:
        made = Megatron(tmp_path / "save", **{"autoeval_config": str(config), **arguments})
        for name, module in made.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        for name, value in (("_training", None), ("_delivery", None), ("_expected", False)):
            monkeypatch.setattr(hook, name, value)
        hook.install()
        made.arguments.add_megatron_arguments(argparse.ArgumentParser())
        return made

    return make


def ended(tmp_path: Path) -> dict[tuple[str, int], Ticket]:
    """The end of the process, and its tickets."""
    hook._deliver_the_rest(os.getpid())
    queue = Queue(str(tmp_path / "queue"))
    found = [queue.read(token) for token in queue.tokens("pending")]
    out = {(t.suite, t.manifest.step): t for t in found}
    assert len(out) == len(found), "a checkpoint was handed over twice"
    return out


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------------- two ways in


def test_importing_it_loads_nothing_heavy() -> None:
    assert not modules_after("import autoeval_hooks.megatron") & (FORBIDDEN | {"megatron"})


def test_the_flag_is_added_once_and_all_is_wrapped_once(
    start: Callable[..., Megatron], caplog: pytest.LogCaptureFixture
) -> None:
    m = start()
    parser = argparse.ArgumentParser()
    assert hook.install(m.arguments.add_megatron_arguments(parser)) is parser
    assert parser.parse_args(["--autoeval-config", "a.yaml"]).autoeval_config == "a.yaml"
    assert parser.parse_args([]).autoeval_config is None
    before = [m.training.train, m.training.save_checkpoint, m.arguments.add_megatron_arguments]
    hook.install()
    hook.install(parser)
    assert before == [m.training.train, m.training.save_checkpoint, m.arguments.add_megatron_arguments]
    assert messages(caplog) == []


def test_a_megatron_that_lacks_what_is_wrapped_trains_on(
    start: Callable[..., Megatron], caplog: pytest.LogCaptureFixture
) -> None:
    m = start()
    del m.wandb_utils.on_save_checkpoint_success  # type: ignore[attr-defined]
    parser = argparse.ArgumentParser()
    assert m.arguments.add_megatron_arguments(parser) is parser
    assert hook.install(parser) is parser       # as a patched Megatron calls it
    assert m.run(lambda: 7) == (7, 0)
    assert any("on_save_checkpoint_success" in text for text in messages(caplog))


MEGATRON = {
    "__init__.py": "", "core/__init__.py": "__version__ = '0'", "training/__init__.py": "",
    "training/arguments.py": "import os\nSEEN = os.environ.get('EARLY')\n"
                             "def add_megatron_arguments(parser):\n    return parser\n",
    "training/wandb_utils.py": "def on_save_checkpoint_success(*a): ...\n",
    "training/checkpointing.py": "def save_checkpoint(*a): ...\n",
    "training/training.py": "def save_checkpoint(*a): ...\ndef training_log(*a): ...\ndef train(*a): ...\n",
}  # fmt: skip
SCRIPT = """
import multiprocessing, os, sys
import beside
def double(x):
    return 2 * x
if __name__ == "__main__":
    os.environ["EARLY"] = "set before Megatron is imported"
    import argparse
    from megatron.training import arguments, training
    assert arguments.SEEN == os.environ["EARLY"], "imported before the script did so"
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    from autoeval_hooks import megatron as ours     # as a patched Megatron imports it
    assert ours._expected, "there are two of us"
    config = parser.parse_args().autoeval_config
    print(sys.argv, config, os.path.basename(__file__), hasattr(training.train, "autoeval"))
    assert sys.path[0] == os.path.dirname(os.path.abspath(__file__))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [21]))
    sys.exit(3)
"""


def as_a_module(tmp_path: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    for name, text in MEGATRON.items():
        path = tmp_path / "site" / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("")
    (tmp_path / "scripts" / "pretrain.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "-m", "autoeval_hooks.megatron", *argv], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", **env}, timeout=60,
    )  # fmt: skip


def test_a_script_runs_as_python_would_run_it(tmp_path: Path) -> None:
    done = as_a_module(tmp_path, "scripts/pretrain.py", "--autoeval-config", "a.yaml")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [
        "['scripts/pretrain.py', '--autoeval-config', 'a.yaml'] a.yaml pretrain.py True", "[42]",
    ]  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [((), "the script is missing"), (("absent.py",), "absent.py: no such file"), (("--lr", "1"), "the script is")],
)
def test_without_a_script_there_is_one_clear_error(tmp_path: Path, argv: tuple[str, ...], wrong: str) -> None:
    done = as_a_module(tmp_path, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert wrong in line
    assert "pretrain_gpt.py ARGUMENTS" in line


def test_the_error_is_said_by_one_rank(tmp_path: Path) -> None:
    done = as_a_module(tmp_path, RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


# ---------------------------------------------------------------------- what is handed over


def test_each_save_is_handed_over_with_what_was_consumed(tmp_path: Path, start: Callable[..., Megatron]) -> None:
    m = start()
    assert m.run(lambda: [m.save(2), m.save(4), "theirs"]) == ([None, None, "theirs"], 0)
    m.save(5)       # after training
    found = ended(tmp_path)
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 5), ("slow", 4)]
    for (_, step), ticket in found.items():
        assert (ticket.manifest.samples, ticket.manifest.tokens) == (4 * step, 4 * step * 8)
        assert ticket.manifest.path == str(tmp_path / "save" / f"iter_{step:07d}")
    assert m.events == [("succeeded", 2), ("succeeded", 4), ("succeeded", 5)]


def test_an_asynchronous_save_has_the_samples_and_the_time_of_its_beginning(
    tmp_path: Path, start: Callable[..., Megatron]
) -> None:
    m = start(async_save=True)
    begun: list[float] = []
    m.run(lambda: [m.save(2), begun.append(time.time()), time.sleep(0.01), m.step(3), m.step(4), m.finalize()])
    ticket = ended(tmp_path)["quick", 2]
    assert ticket.manifest.samples == 8
    assert ticket.manifest.saved_at <= begun[0]


@pytest.mark.parametrize("is_async", [False, True])
def test_retention_waits_for_a_slow_pin(
    tmp_path: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """Each save deletes the one before it; two asynchronous ones may become complete at the same moment."""
    make = pin.make

    def slow(source: str, *args: Any) -> str:
        time.sleep(0.3 if ".autoeval" not in source else 0)
        return make(source, *args)

    monkeypatch.setattr(pin, "make", slow)
    m = start(async_save=is_async)
    m.retain = True
    m.run(lambda: [m.save(1), m.save(2), m.save(3), m.finalize()])
    assert sorted(ended(tmp_path)) == [("quick", 1), ("quick", 2), ("quick", 3)]


def test_what_is_no_checkpoint_of_this_training_is_left_alone(tmp_path: Path, start: Callable[..., Megatron]) -> None:
    m = start()
    m.run(lambda: [
        m.save(2, directory=str(tmp_path / "save" / "non_persistent"), non_persistent_ckpt=True),
        m.save(3, path="release"),
        m.save(4),
    ])  # fmt: skip
    assert hook._training is not None
    assert 2 not in hook._training._begun       # a passing one waits for nothing, and nothing waits for it
    m.args.ckpt_convert_format = "torch"
    m.save(5)
    assert sorted(ended(tmp_path)) == [("quick", 4), ("slow", 4)]
    assert m.events == [("succeeded", i) for i in (2, 3, 4, 5)]


def test_the_old_format_names_a_file_of_one_rank(tmp_path: Path, start: Callable[..., Megatron]) -> None:
    m = start(ckpt_format="torch")
    m.write = layouts.torch
    m.run(lambda: m.save(2))
    found = ended(tmp_path)["quick", 2].manifest
    assert found.path == str(tmp_path / "save" / "iter_0000002")
    assert [f.path for f in found.files] == ["mp_rank_00/model_optim_rng.pt"]


@pytest.mark.parametrize("written", ["torch_dcp", "fsdp_dtensor"])
def test_formats_without_a_metadata_json(tmp_path: Path, start: Callable[..., Megatron], written: str) -> None:
    m = start(ckpt_format=written)
    m.write = layouts.torch_dcp
    m.run(lambda: m.save(2))
    found = ended(tmp_path)["quick", 2].manifest
    assert found.megatron is not None
    assert found.megatron.format == written
    assert [f.path for f in found.files] == [".metadata", *layouts.SHARDS]


def test_only_the_last_rank_acts(tmp_path: Path, start: Callable[..., Megatron]) -> None:
    m = start(world_size=2)
    m.run(lambda: [m.step(1), m.save(2)])
    assert hook._delivery is None
    assert not (tmp_path / "queue").exists()
    assert m.events == [("log", 1), ("succeeded", 2)]


def test_a_checkpoint_that_another_node_wrote_shows_itself_whole_later(
    tmp_path: Path, start: Callable[..., Megatron]
) -> None:
    m = start()

    def late(path: Path) -> None:
        layouts.torch_dist(path)
        os.rename(path / "metadata.json", tmp_path / "metadata.json")
        threading.Timer(0.3, lambda: os.rename(tmp_path / "metadata.json", path / "metadata.json")).start()

    m.write = late
    m.run(lambda: m.save(2))
    assert sorted(ended(tmp_path)) == [("quick", 2)]


def test_one_that_stays_incomplete_is_given_up(
    tmp_path: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(megatron_training, "SETTLE_S", 0.2)
    m = start()
    m.write = layouts.torch_dcp       # without the file that says that a torch_dist checkpoint is complete
    m.run(lambda: m.save(2))
    assert hook._delivery is not None
    assert hook._delivery.finish(1)
    assert ended(tmp_path) == {}
    tried, given_up = messages(caplog)
    assert "will be tried again" in tried
    assert "given up" in given_up
    assert "has no metadata.json" in given_up
    assert os.listdir(tmp_path / "save" / ".autoeval" / "pins") == []


def test_what_is_given_up_leaves_no_pin(
    tmp_path: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bool:
        raise CheckpointError("not this one")

    monkeypatch.setattr(Queue, "enqueue", refuse)
    monkeypatch.setattr(Queue, "known", refuse)
    m = start()
    m.run(lambda: m.save(2))
    assert ended(tmp_path) == {}
    assert os.listdir(tmp_path / "save" / ".autoeval" / "pins") == []


# ---------------------------------------------------------------------- training never notices


def test_the_original_is_called_whatever_happens_in_ours(
    start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("begins", "save_begins", "saved", "logged", "ends"):
        monkeypatch.setattr(Training, name, lambda *a: 1 / 0)
    m = start()
    assert m.run(lambda: [m.step(1), m.save(2)]) == ([None, None], 0)
    assert m.wandb_utils.on_save_checkpoint_success("p", "t", "d", 9) == "their answer"
    assert m.events == [("log", 1), ("succeeded", 2), ("succeeded", 9)]
    assert all("division by zero" in text for text in messages(caplog))


def test_theirs_raises_as_it_did(tmp_path: Path, start: Callable[..., Megatron]) -> None:
    m = start()

    def steps() -> None:
        m.save(2)
        sys.exit(15)        # as after a signal

    with pytest.raises(SystemExit, match="15"):
        m.run(steps)
    m.wandb_utils._ = None  # type: ignore[attr-defined]
    assert sorted(ended(tmp_path)) == [("quick", 2)]


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no such file"), ("queue: q\nsuites: {a: {evaluator: []}}\n", "'evaluators'"), ("[", "")]
)
def test_without_a_usable_configuration_one_warning(
    config: Path, start: Callable[..., Megatron], caplog: pytest.LogCaptureFixture, text: str | None, said: str
) -> None:
    config.unlink()
    if text is not None:
        config.write_text(text)
    m = start()
    m.run(lambda: [m.step(1), m.save(2)])
    (warning,) = messages(caplog)
    assert "training goes on" in warning
    assert said in warning
    assert str(config) in warning
    assert m.events == [("log", 1), ("succeeded", 2)]


@pytest.mark.parametrize(("asked_for", "warnings"), [(True, 1), (False, 0)], ids=["-m", "patched"])
def test_naming_none_is_a_mistake_where_we_were_asked_for(
    start: Callable[..., Megatron], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    asked_for: bool, warnings: int,
) -> None:  # fmt: skip
    m = start(autoeval_config=None)
    monkeypatch.setattr(hook, "_expected", asked_for)
    m.run(lambda: m.save(2))
    assert len(messages(caplog)) == warnings


def test_the_environment_may_name_it(
    tmp_path: Path, config: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch
) -> None:
    m = start()
    del m.args.autoeval_config      # as with --yaml-cfg
    monkeypatch.setenv(hook.VARIABLE, str(config))
    m.run(lambda: m.save(2))
    assert sorted(ended(tmp_path)) == [("quick", 2)]


def test_a_hanging_file_system_costs_one_deadline(
    config: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config.write_text(config.read_text().replace("2.0", "0.3"))
    for_ever = threading.Event()
    monkeypatch.setattr(pin, "make", lambda *a: for_ever.wait())
    m = start()
    began = time.monotonic()
    m.run(lambda: [m.save(i) for i in range(1, 20)])
    took = time.monotonic() - began
    for_ever.set()
    assert 0.25 < took < 1.5
    assert sum("delivery is behind" in text for text in messages(caplog)) == 1


def test_a_save_costs_the_training_thread_at_most_two_milliseconds(
    tmp_path: Path, config: Path, start: Callable[..., Megatron]
) -> None:
    """Its own time at p99; of the time that passes, of which neighbours of this machine take their part, the median."""
    config.write_text("queue: queue\nhook: {max_pins: 1000}\nsuites: {quick: {evaluators: [{type: helm}]}}\n")
    m, passed, own = start(), [], []

    def steps() -> None:
        for step in range(1, 101):
            path = layouts.torch_dist(tmp_path / "save" / f"iter_{step:07d}", os.urandom(100_000))
            began = time.perf_counter(), time.thread_time()
            hook._save_begins(step)
            hook._save_ends(str(path), "tracker", str(path.parent), step)
            passed.append(1e3 * (time.perf_counter() - began[0]))
            own.append(1e3 * (time.thread_time() - began[1]))
            assert hook._delivery is not None
            hook._delivery.flush(2)       # a step of training; a save that comes sooner waits for the pin

    m.run(steps)
    (p50, p99), own_p99 = (sorted(passed)[i] for i in (50, 98)), sorted(own)[98]
    print(f"\non a save: p50 {p50:.3f} ms, p99 {p99:.3f} ms, of which own {own_p99:.3f} ms, over {len(own)} saves")
    assert own_p99 <= 2.0
    assert p50 <= 2.0


# ---------------------------------------------------------------------- going on


def trained(m: Megatron, *steps: int) -> None:
    m.run(lambda: [m.save(step) for step in steps])
    hook._deliver_the_rest(os.getpid())


def test_a_resume_hands_over_what_the_training_before_it_could_not(
    tmp_path: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = tmp_path / "save"
    layouts.torch_dist(save / "iter_0000001", b"another training's")
    time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "saved", lambda *a: None)
        trained(start(), 2, 4, 6)
    layouts.torch_dcp(save / "iter_0000003")      # cut off
    assert ended(tmp_path) == {}
    trained(start(iteration=4, load=str(save)), 5)
    found = ended(tmp_path)
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 5), ("slow", 4)]
    assert [found["quick", step].manifest.samples for step in (2, 4, 5)] == [8, 16, 20]
    assert len({t.manifest.run.id for t in found.values()}) == 1
    (warning,) = messages(caplog)
    assert "given up" in warning
    assert "iter_0000003" in warning


def test_what_training_saves_meanwhile_goes_before_the_rest_of_what_was_left(
    tmp_path: Path, config: Path, start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest first: the next save may delete it."""
    config.write_text(config.read_text().replace("2.0", "0.2"))
    with monkeypatch.context() as patch:
        patch.setattr(Training, "saved", lambda *a: None)
        trained(start(), 1, 2, 3)
    make, begun, saved, order = pin.make, threading.Event(), threading.Event(), []

    def noted(source: str, *args: Any) -> str:
        if ".autoeval" not in source:
            order.append(int(source[-1]))
            begun.set()
            assert saved.wait(10)
        return make(source, *args)

    monkeypatch.setattr(pin, "make", noted)
    m = start(iteration=3, load=str(tmp_path / "save"))
    m.run(lambda: [begun.wait(10), m.save(4), saved.set()])
    assert len(ended(tmp_path)) == 5
    assert order == [3, 4, 2, 1]


def test_of_a_training_that_began_without_us_only_the_checkpoint_resumed_from_is_ours(
    tmp_path: Path, start: Callable[..., Megatron]
) -> None:
    save = tmp_path / "save"
    for step in (2, 4):
        layouts.torch_dist(save / f"iter_{step:07d}")
    growing = {"rampup_batch_size": ["2", "2", "100"], "consumed_train_samples": 10}    # counted by Megatron
    trained(start(iteration=4, load=str(save), **growing), 5)
    found = ended(tmp_path)
    assert sorted(found) == [("quick", 4), ("quick", 5), ("slow", 4)]
    assert (found["quick", 4].manifest.samples, found["quick", 4].manifest.tokens) == (10, 80)


def test_a_training_that_goes_on_from_elsewhere_reconciles_nothing(
    tmp_path: Path, start: Callable[..., Megatron]
) -> None:
    layouts.torch_dist(tmp_path / "save" / "iter_0000004")
    trained(start(iteration=4, load=str(tmp_path / "pretrained")), 5)
    assert sorted(ended(tmp_path)) == [("quick", 5)]


# ---------------------------------------------------------------------- scores


class Row:
    """A relay that notes at which iteration a point would have joined a row."""

    def __init__(self) -> None:
        self.step, self.calls = 0, []       # type: int, list[Any]

    def on_log(self) -> None:
        self.calls.append(self.step)

    def end(self, last_step: int, wait: float) -> None:
        self.calls.append(("end", last_step, wait))


class Unasked:
    """A W&B run that no iteration may ask for its step: that is a request to another process, which may hang."""

    disabled, id = False, "run"
    name = project = entity = group = dir = ""
    settings = types.SimpleNamespace(base_url="", mode="offline")

    @property
    def step(self) -> int:
        raise TimeoutError("wandb-core does not answer")


@pytest.mark.parametrize(("tensorboard", "joined"), [("tb", [4, 6]), (None, [])])
def test_a_point_joins_a_row_that_training_has_begun_and_no_other(
    start: Callable[..., Megatron], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tensorboard: str | None, joined: list[int],
) -> None:  # fmt: skip
    m, row = start(train_iters=6, tensorboard_dir=tensorboard, tensorboard_log_interval=2), Row()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=Unasked()))  # type: ignore[arg-type]

    def steps() -> None:
        assert hook._training is not None
        hook._training._relay = row  # type: ignore[assignment]
        for iteration in (3, 4, 5, 6):
            row.step = iteration
            m.step(iteration)

    m.run(steps)
    assert row.calls == [*joined, ("end", 6, 0.0), ("end", 6, 2.0)]
    assert not [message for message in messages(caplog) if "wandb-core" in message]


# ---------------------------------------------------------------------- the record


def test_the_record_has_what_the_arguments_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary, words = tmp_path / "vocab.json", tmp_path / "words"
    vocabulary.write_text("{}")
    words.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (words / name).write_text("{}")
    args = argparse.Namespace(
        ckpt_format="torch", world_size=8, tensor_model_parallel_size=4, num_layers=None, vocab_file="vocab.json",
        tokenizer_model=str(words), tokenizer_type="HuggingFaceTokenizer", tiktoken_special_tokens=["<s>", "</s>"],
        tokenizer_hf_no_use_fast=True, merge_file=None, vocab_size=64,
    )  # fmt: skip
    found = record(args)
    assert (found.format, found.world_size, found.tensor_parallel, found.num_layers) == ("torch", 8, 4, 0)
    assert found.tokenizer == {
        "vocab_file": "vocab.json", "tokenizer_model": str(words), "tiktoken_special_tokens": "<s> </s>",
        "tokenizer_hf_no_use_fast": "true", "vocab_size": "64",
    }  # fmt: skip
    assert found.tokenizer_files == ()
    given = with_tokenizer_files(found, str(tmp_path))
    assert given.tokenizer == found.tokenizer | {"vocab_file": str(vocabulary)}
    files = given.tokenizer_files
    assert [f.path for f in files] == [str(vocabulary), *(str(words / n) for n in sorted(os.listdir(words))[1:])]
    assert files[0].digest == manifest.record(str(tmp_path), "vocab.json").digest
    assert messages(caplog) == []


def test_a_tokenizer_that_is_no_file_here_has_none(tmp_path: Path) -> None:
    named = record(argparse.Namespace(tokenizer_model="meta-llama/Llama-3.2-1B", vocab_file="gone.json"))
    assert with_tokenizer_files(named, str(tmp_path)) == named


@pytest.mark.parametrize(
    ("arguments", "samples"),
    [
        ({"global_batch_size": 4}, 40),
        ({"global_batch_size": 4, "rampup_batch_size": ["2", "2", "9"]}, None),
        ({"global_batch_size": 4, "step_batch_size_schedule": "0:2"}, None),
        ({}, None),
    ],
)
def test_samples_are_told_where_the_batch_size_was_always_the_same(
    arguments: dict[str, Any], samples: int | None
) -> None:
    size = arguments.get("global_batch_size", 0)
    assert samples_at(argparse.Namespace(**arguments), 10, resumed_at=20, consumed=20 * size) == samples
    assert samples_at(argparse.Namespace(**arguments), 10, resumed_at=0, consumed=0) == samples


def test_samples_of_another_batch_size_are_unknown_but_for_where_they_were_counted() -> None:
    args = argparse.Namespace(global_batch_size=512)
    known = {step: samples_at(args, step, resumed_at=1000, consumed=256_000) for step in (500, 1000, 1500)}
    assert known == {500: None, 1000: 256_000, 1500: None}
