"""Conversions: one for each checkpoint, never half-made, kept and removed with care. The converter is a stand-in."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoeval_hooks import manifest, ticket
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import config as configs
from eval_runner.checkpoints import convert, kept, megatron
from eval_runner.checkpoints.base import Request, Servable
from eval_runner.checkpoints.locks import Lock
from eval_runner.cli.validate import check as validated
from eval_runner.evaluators.base import Limits
from eval_runner.process import Stopped
from tests import converters
from tests import megatron_layouts as made
from tests.processes import wait_for

COMMAND = [sys.executable, converters.__file__, "{checkpoint}", "{output}"]
WAIT_S = 60.0


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer"
    path.mkdir()
    (path / "tokenizer.json").write_text('{"given": true}')
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many times the converter was started."""
    path = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(path))
    return lambda: len(path.read_text().splitlines()) if path.exists() else 0


Prepare = Callable[..., AbstractContextManager[Servable]]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Path) -> Prepare:
    """The adapter's context for a checkpoint of these weights, converted so."""
    count = iter(range(1000))

    def go(
        *how: str, weights: bytes = b"weights", step: int = 10, command: list[str] | None = None, keep: int = 2,
        given: bool = True, runner: dict[str, Any] | None = None, **options: Any,
    ) -> AbstractContextManager[Servable]:  # fmt: skip
        path = tmp_path / "out" / f"iter_{step:07d}"
        if not path.exists():
            made.torch_dist(path, weights)
        found = manifest.build(str(path), path=str(path), step=step, run=RunIdentity("run"))
        file = tmp_path / "autoeval.yaml"
        file.write_text(yaml.safe_dump({
            "queue": "queue", "run": {"tokenizer": str(tokenizer)} if given else {},
            "suites": {"quick": {"evaluators": [{"type": "helm"}]}},
            "runner": {"allow_pickled_weights": True} | (runner or {}),
            "convert": {"command": command or [*COMMAND, *how], "directory": "kept", "keep": keep},
        }))  # fmt: skip
        work = tmp_path / f"work{next(count)}"
        work.mkdir()
        request = Request(
            ticket.new(found, "quick", "5" * 64, 5), configs.load(str(file)), work, work.with_suffix(".log"),
            limits=Limits(grace=1.0), **options,
        )  # fmt: skip
        return megatron.prepare(request)

    return go


def directories(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "kept").iterdir() if p.is_dir())


def test_what_is_converted_is_like_any_hugging_face_checkpoint(
    prepare: Prepare, calls: Callable[[], int], tmp_path: Path
) -> None:
    with prepare() as first:
        assert first.megatron is None
        assert first.tokenizer == first.path
        assert "'.metadata', '__0_0.distcp'" in (first.path / "model.safetensors").read_text()
        assert first.facts["converted by"].startswith(Path(sys.executable).name)
        first.unchanged()
    with prepare() as second:       # another suite, another runner, another attempt
        assert second.path == first.path
    assert calls() == 1
    with prepare(step=20, weights=b"other") as third:
        assert third.path != first.path
    assert calls() == 2
    assert len(directories(tmp_path)) == 2


def test_another_command_converts_anew(prepare: Prepare, calls: Callable[[], int]) -> None:
    for how in ((), ("other",), ()):
        with prepare(*how) as servable:
            assert str(how) in (servable.path / "model.safetensors").read_text()
    assert calls() == 2


def test_the_placeholders_are_filled_in_and_the_braces_of_others_stay(prepare: Prepare, tokenizer: Path) -> None:
    with prepare("s{step}", "{{x}}", "{tokenizer}") as servable:
        text = (servable.path / "model.safetensors").read_text()
    assert repr(("s10", "{x}", str(tokenizer))) in text


def test_another_tokenizer_converts_anew_where_the_command_uses_it(
    prepare: Prepare, calls: Callable[[], int], tokenizer: Path
) -> None:
    for content, expected in (("{}", 1), ('{"other": 1}', 2), ('{"other": 1}', 2)):
        (tokenizer / "tokenizer.json").write_text(content)
        with prepare("{tokenizer}"):
            assert calls() == expected


def test_without_a_tokenizer_of_its_own_the_given_one_is_used(prepare: Prepare, tokenizer: Path) -> None:
    with prepare("bare") as servable:
        assert servable.tokenizer == tokenizer
    with prepare("whole", given=False) as servable:
        assert servable.tokenizer == servable.path
    with pytest.raises(CheckpointError, match=r"set `run\.tokenizer`"), prepare("bare", given=False):
        pass


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("fails", AutoEvalError, "not converted: .*exit status 3; it said: .*no such architecture; log: "),
        ("nothing", ConfigError, r"autoeval\.yaml: convert\.command: .*\(no config\.json\); it said: converting iter_"),
        ("no-weights", ConfigError, r"autoeval\.yaml: convert\.command: .*left no weights in \{output\}"),
        ("link", ConfigError, r"left a link, config\.json, that leads out of"),
        ("code", CheckpointError, r"config\.json: names code of the checkpoint's own"),
        ("rewrites", CheckpointError, "changed while it was evaluated"),
    ],
)
def test_a_conversion_that_fails_says_why_and_leaves_nothing(
    prepare: Prepare, tmp_path: Path, how: str, error: type[AutoEvalError], says: str
) -> None:
    with pytest.raises(error, match=says) as raised, prepare(how):
        pass
    assert raised.value.kind == error.kind
    assert str(raised.value).count("\n") == 0
    assert directories(tmp_path) == []


def test_leave_to_load_it_is_asked_each_time(prepare: Prepare) -> None:
    trusting = {"trust_remote_code": True}
    with prepare("code", runner=trusting):
        pass
    with pytest.raises(CheckpointError, match="trust_remote_code"), prepare("code"):
        pass


def test_pickled_weights_are_refused_before_anything_is_run(prepare: Prepare, calls: Callable[[], int]) -> None:
    with pytest.raises(CheckpointError, match=r"set `runner\.allow_pickled_weights: true`") as raised, \
            prepare(runner={"allow_pickled_weights": False}):
        pass
    assert "iter_0000010" in str(raised.value)
    assert calls() == 0
    with prepare("pickle") as servable:
        assert (servable.path / "pytorch_model.bin").exists()


def test_a_change_while_it_is_used_is_found_and_it_is_made_anew_then(
    prepare: Prepare, calls: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    with prepare() as servable:
        (servable.path / "config.json").write_text('{"model_type": "other"}')
        with pytest.raises(CheckpointError, match=r"config\.json: changed while it was evaluated"):
            servable.unchanged()
    with prepare() as servable:
        assert json.loads((servable.path / "config.json").read_text()) == {"model_type": "llama"}
    assert calls() == 2
    assert "it is made anew" in caplog.text


@pytest.mark.parametrize("harm", ["record", "added", "gone"])
def test_what_is_not_as_it_was_left_is_made_anew(
    prepare: Prepare, calls: Callable[[], int], tmp_path: Path, harm: str
) -> None:
    with prepare() as servable:
        model = servable.path
    if harm == "record":
        (model.parent / "autoeval-kept.json").write_text("{}")
    elif harm == "added":
        (model / "pytorch_model.bin").write_bytes(b"new")
    else:
        (model / "tokenizer.json").unlink()
    if harm == "record":        # else `_remove` would not know it for ours
        assert (model.parent / "autoeval-kept.json").is_file()
    with prepare() as servable:
        servable.unchanged()
    assert calls() == 2


def test_the_source_is_watched_too(prepare: Prepare, tmp_path: Path) -> None:
    with prepare() as servable:
        (tmp_path / "out" / "iter_0000010" / "common.pt").write_bytes(b"new")
        with pytest.raises(CheckpointError, match=r"common\.pt: changed while"):
            servable.unchanged()


# ---------------------------------------------------------------------- at once


def test_two_that_ask_at_once_convert_once(prepare: Prepare, calls: Callable[[], int], tmp_path: Path) -> None:
    paths, said, entered = [], [], [prepare("slow"), None]
    entered[1] = prepare("slow", progress=lambda step: lambda fraction, what: said.append(what))

    def one(context: AbstractContextManager[Servable]) -> None:
        with context as servable:
            paths.append(servable.path)

    threads = [threading.Thread(target=one, args=(entered[0],), daemon=True)]
    threads[0].start()
    wait_for(lambda: calls() == 1)
    threads.append(threading.Thread(target=one, args=(entered[1],), daemon=True))
    threads[1].start()
    wait_for(lambda: bool(said))
    (tmp_path / "calls.go").touch()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(paths) == 2
    assert paths[0] == paths[1]
    assert calls() == 1
    assert said == ["waiting: the same checkpoint is being converted"]


def test_who_waits_or_converts_heeds_that_it_must_stop(
    prepare: Prepare, calls: Callable[[], int], tmp_path: Path
) -> None:
    stop, over = threading.Event(), []

    def one() -> None:
        with pytest.raises(Stopped), prepare("slow", stopping=stop.is_set):
            pass
        over.append(True)

    thread = threading.Thread(target=one, daemon=True)
    thread.start()
    wait_for(lambda: calls() == 1)
    with pytest.raises(Stopped), prepare("slow", stopping=lambda: True):
        pass
    stop.set()
    thread.join(WAIT_S)
    assert over
    assert calls() == 1
    assert directories(tmp_path) == []


def test_a_directory_that_is_not_ours_stands_in_the_way_once(
    prepare: Prepare, calls: Callable[[], int], tmp_path: Path
) -> None:
    with prepare():
        (name,) = directories(tmp_path)
    (tmp_path / "kept" / name / "autoeval-kept.json").unlink()
    with pytest.raises(ConfigError, match=f"{name}: is none of the directories that autoeval made; remove it"), \
            prepare():
        pass
    assert calls() == 1


def test_what_cannot_be_found_as_it_was_left_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").symlink_to(path / "config.json")      # leads nowhere once it was moved

    with Lock(tmp_path / f"{'b' * 64}.lock") as lock, \
            pytest.raises((ConfigError, CheckpointError), match="not as it was left"):
        kept.obtain(tmp_path, "b" * 64, lock, make, source="it", keep=2, stopping=lambda: len(made) > 3,
                    waits=lambda: None)  # fmt: skip
    assert len(made) == 1


def test_a_script_that_was_mended_converts_anew(prepare: Prepare, calls: Callable[[], int], tmp_path: Path) -> None:
    script = tmp_path / "converter.py"
    script.write_bytes(Path(COMMAND[1]).read_bytes())
    command = [COMMAND[0], str(script), *COMMAND[2:]]
    for expected in (1, 1, 2):
        if expected == 2:
            script.write_text(script.read_text() + "# mended\n")
        with prepare(command=command):
            assert calls() == expected


def test_what_a_killed_runner_left_half_made_is_removed(
    prepare: Prepare, calls: Callable[[], int], tmp_path: Path
) -> None:
    with prepare():
        (name,) = directories(tmp_path)
    (tmp_path / "kept" / name).rename(tmp_path / "kept" / f".new-{name}")
    (tmp_path / "kept" / f".new-{'a' * 64}").mkdir()
    with prepare():
        assert directories(tmp_path) == [name]
    assert calls() == 2


def test_those_used_last_are_kept_and_none_in_use_or_not_ours_is_removed(prepare: Prepare, tmp_path: Path) -> None:
    stranger = tmp_path / "kept" / ("b" * 64)
    (stranger / "model").mkdir(parents=True)
    (tmp_path / "kept" / "mine").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "kept" / ("c" * 64)).symlink_to(elsewhere)
    names = {}

    def use(step: int) -> AbstractContextManager[Servable]:
        return prepare(step=step, weights=b"%d" % step, keep=2)

    with use(1) as first:
        names[1] = first.path.parent.name
        for step in (2, 3):
            with use(step) as servable:
                names[step] = servable.path.parent.name
        assert first.path.is_dir()      # the oldest of three, and in use
        first.unchanged()
    with use(2):
        pass
    with use(4) as servable:
        names[4] = servable.path.parent.name
    left = {n for n in directories(tmp_path) if n in names.values()}
    assert left == {names[2], names[4]}
    assert stranger.is_dir()
    assert (tmp_path / "kept" / "mine").is_dir()
    assert elsewhere.is_dir()
    assert not (tmp_path / "kept" / f"{names[1]}.lock").exists()


def test_a_lock_whose_file_was_removed_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with Lock(path) as late, Lock(path) as first:
        assert first.alone()
        assert not late.alone()
        assert not late.shared()
        first.remove()
        first.release()
        with Lock(path) as other:       # makes another file
            assert other.alone()
            assert not late.alone()     # though it has the old one open
            assert not late.shared()
        assert late.alone()


def test_a_directory_that_vanishes_is_made_anew_without_a_word(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between a look at it and the lock, another removed it."""
    with prepare():
        pass
    real, looks = kept._inode, iter([12345])
    monkeypatch.setattr(kept, "_inode", lambda path: next(looks, None) or real(path))
    with prepare("other") as servable:
        servable.unchanged()
    assert "anew" not in caplog.text


# ---------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["{checkpoint}"], r"convert\.command\[0\]: '\{checkpoint\}' is no program here"),
        (["no-such-program", "{checkpoint}", "{output}"], r"convert\.command\[0\]: 'no-such-program' is no program"),
        (["./no/such", "{checkpoint}", "{output}"], r"'\./no/such' is no program"),
        ([sys.executable, "{checkpont}", "{output}"], r"command\[1\]: \{checkpont\} stands for .* mean 'checkpoint'\?"),
        ([sys.executable, "{checkpoint}"], r"convert\.command: has no \{output\}"),
        ([sys.executable, "{output}"], r"convert\.command: has no \{checkpoint\}"),
        ([sys.executable, "{checkpoint}", "{output}", "{step.real}"], r"command\[3\]: \{step\.real\} stands for"),
        ([sys.executable, "{checkpoint}", "{output}", "{step!r:>9}"], r"command\[3\]: \{step!r:>9\} stands for"),
        ([sys.executable, "{checkpoint}", "{output}", "{}"], r"command\[3\]: \{\} stands for nothing"),
        ([sys.executable, "{checkpoint}", "{output}", '{"a": 1}'], r"command\[3\]: .*write \{\{ and \}\}"),
        ([sys.executable, "{checkpoint}", "{output}", "}"], r"command\[3\]: .*write \{\{ and \}\}"),
    ],
)
def test_a_command_that_cannot_work_is_said(tmp_path: Path, command: list[str], says: str) -> None:
    config = load(tmp_path, {"command": command})
    with pytest.raises(ConfigError, match=rf"autoeval\.yaml: {says}" if says.startswith("convert") else says):
        convert.check(config)
    assert any("convert.command" in line for line in validated(config))


def load(tmp_path: Path, section: dict[str, Any]) -> configs.Config:
    file = tmp_path / "autoeval.yaml"
    suites = {"quick": {"evaluators": [{"type": "helm"}]}}
    file.write_text(yaml.safe_dump({"queue": "q", "suites": suites, "convert": section, "sinks": []}))
    return configs.load(str(file))


def test_a_program_beside_the_configuration_is_found(tmp_path: Path) -> None:
    program = tmp_path / "mine.sh"
    program.write_text("#!/bin/sh\n")
    config = load(tmp_path, {"command": ["./mine.sh", "{checkpoint}", "{output}"]})
    with pytest.raises(ConfigError, match="is no program"):     # it may not be run
        convert.check(config)
    program.chmod(0o755)
    convert.check(config)


def test_a_program_that_does_not_start_is_a_mistake_of_the_configuration(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"\0\1\2")
    (tmp_path / "mine").chmod(0o755)
    with pytest.raises(ConfigError, match=r"mine cannot be run \(Exec format error\)"), \
            prepare(command=["./mine", "{checkpoint}", "{output}"]):
        pass


def test_a_directory_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load(tmp_path, {"command": COMMAND, "directory": "file/below"})
    with pytest.raises(ConfigError, match=r"autoeval\.yaml: convert\.directory: .*file: not a directory; name another"):
        convert.check(config)
    assert not (tmp_path / "queue").exists()


def test_the_default_directory_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = load(tmp_path, {"command": COMMAND}).convert
    assert section is not None
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert convert.directory_of(section) == Path("/cache/autoeval/converted")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert convert.directory_of(section) == Path(os.path.expanduser("~/.cache/autoeval/converted"))
