"""What the publisher does with a mark, a record and a file server that are not as they should be."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from autoeval_hooks import relay_files as files
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Queue
from eval_runner.publisher import Publisher
from eval_runner.results import store
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink
from tests.results_samples import publish, result, score
from tests.results_samples import queue as made
from tests.stand_ins import Shown
from tests.wandb_runs import result as wandb_result


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = made(tmp_path / "queue")
    (root / "published" / "shown").mkdir(parents=True)
    publish(root, result(1, score(0.5)))
    return root


def publisher(root: Path, sink: Shown, ops: FileOps | None = None) -> Publisher:
    return Publisher(Queue(str(root), ops=ops), {"shown": sink})


def test_what_another_runner_marked_meanwhile_is_no_fault(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Faster(Shown):
        def publish(self, found: object) -> None:
            super().publish(found)      # type: ignore[arg-type]
            publisher(root, Shown()).look()

    caplog.set_level(logging.WARNING)
    assert publisher(root, Faster()).look()
    assert caplog.records == []
    assert len(os.listdir(root / "published" / "shown")) == 1


def test_a_record_that_cannot_be_read_now_is_tried_again(root: Path) -> None:
    class Away(FileOps):
        def read(self, path: str, limit: int, owners: frozenset[int] | None = None) -> bytes:
            if path.endswith(store.RECORD):
                raise OSError(errno.ESTALE, "Stale file handle", path)
            return super().read(path, limit, owners)

    sink = Shown()
    assert not publisher(root, sink, Away()).look()
    assert publisher(root, sink).look()
    assert len(sink.results) == 1


def test_a_record_that_is_gone_is_not_waited_for(root: Path) -> None:
    for path in (root / "results").iterdir():
        shutil.rmtree(path)
    sink = Shown()
    assert publisher(root, sink).look()
    assert sink.results == []
    assert os.listdir(root / "published" / "shown") == []       # if it comes back, it is shown


def test_a_point_whose_link_reply_was_lost_waits_like_any_other(tmp_path: Path) -> None:
    class LostReply(FileOps):
        def link(self, src: str, dst: str) -> None:
            super().link(src, dst)
            raise FileExistsError(errno.EEXIST, "reply lost", dst)

    found = wandb_result(5)
    WandbSink({}, Context(queue=tmp_path, runner="r", where="sinks[0]", ops=LostReply())).publish(found)
    directory = tmp_path / "relay" / found.run.key
    assert [files.waiting(str(directory), stage) for stage in ("points", "taken")] == [[f"{found.ticket}.json"], []]
