"""The callback for Megatron-Bridge, with Bridge's own callback manager and `wandb_utils`.

These two modules are the real ones, from its wheel. What imports CUDA is left out: the packages above them and
`common_utils` are stand-ins, and so is the training loop (tests/bridge_stand_in).
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from autoeval_hooks.megatron_bridge import AutoEvalCallback
from autoeval_hooks.queue import Queue
from tests import bridge_stand_in as stand_in
from tests.megatron.conftest import CONFIG, SITE

pytestmark = pytest.mark.megatron
TRAINING = SITE / "megatron/bridge/training"


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("behind", [None, 2])
def test_real_callbacks_hand_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int | None) -> None:
    stand_in.modules(monkeypatch)
    common = types.ModuleType("megatron.bridge.utils.common_utils")
    common.print_rank_last = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, common.__name__, common)
    wandb_utils = load(stand_in.WANDB_UTILS, TRAINING / "utils/wandb_utils.py", monkeypatch)
    callbacks = load("megatron.bridge.training.callbacks", TRAINING / "callbacks.py", monkeypatch)
    (tmp_path / "autoeval.yaml").write_text(CONFIG)
    manager = callbacks.normalize_callbacks([AutoEvalCallback(tmp_path / "autoeval.yaml")])
    assert {event for event in manager.events if manager.has_callbacks(event)} == {
        "on_train_start", "on_train_step_start", "on_checkpoint_save", "on_train_end",
    }  # fmt: skip
    cfg = stand_in.configuration(tmp_path / "out", async_save=behind is not None)
    stand_in.Bridge(manager, wandb_utils, cfg, behind=behind or 0).train()
    queue = Queue(str(tmp_path / "queue"))
    found = [queue.read(token) for token in queue.tokens("pending")]
    assert sorted((t.suite, t.manifest.step, t.manifest.samples) for t in found) == [
        ("quick", 2, 8), ("quick", 4, 16), ("quick", 6, 24), ("slow", 4, 16),
    ]  # fmt: skip


def test_the_stand_in_saves_in_the_order_of_the_real_one() -> None:
    """What the callback lives on: the path is given away just before the event, by one finalizer before."""
    tree = ast.parse((TRAINING / "checkpointing.py").read_text())
    (save,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "save_checkpoint")
    told = [
        n.func.value.id + "." + n.func.attr for n in ast.walk(save)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and isinstance(n.func.value, ast.Name)
    ]  # fmt: skip
    assert "wandb_utils.on_save_checkpoint_success" in told
    finalizers = [
        n.args[0].id for n in sorted(ast.walk(save), key=lambda n: getattr(n, "lineno", 0))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "add_finalize_fn"
        and isinstance(n.args[0], ast.Name)
    ]  # fmt: skip
    wanted = ["train_state_finalize_fn", "_post_save_global_barrier", "wandb_finalize_fn", "fire_callback"]
    assert [name for name in finalizers if name in wanted] == wanted
    (call,) = (
        n for n in ast.walk(save)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "wandb_utils.on_save_checkpoint_success"
    )  # fmt: skip
    assert [ast.unparse(argument) for argument in call.args[:2]] == ["checkpoint_name", "save_dir"]
