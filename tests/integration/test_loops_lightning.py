"""The Lightning callback in real trainings: what it exports when, what stays on disk, and what training sees of it."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from autoeval_hooks import ConfigError, manifest
from autoeval_hooks import lightning as adapter
from autoeval_hooks.lightning import AutoEvalCallback
from autoeval_hooks.queue import Queue
from tests.loops import ROOT, checked, example, offline, scored
from tests.trainer import VOCABULARY, Tokens, handed_over

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def small() -> GPT2LMHeadModel:
    shape = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1))


class Module(LightningModule):
    def __init__(self, **more: torch.nn.Module) -> None:
        super().__init__()
        self.net = small()
        for name, value in more.items():
            setattr(self, name, value)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        f"queue: {tmp_path}/queue\n"
        "run: {tokens_per_step: 64}\n"
        "hook: {deadline: 2.0}\n"
        "suites: {quick: {every_steps: 2, evaluators: [{type: helm, entries: [a]}]}}\n"
    )
    return path


def trainer(out: Path, *callbacks: Any, steps: int = 6, every: int = 1, **settings: Any) -> Trainer:
    """A Trainer that saves every step and keeps the newest."""
    given = {
        "accelerator": "cpu", "max_steps": steps, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "default_root_dir": out,
        "callbacks": [ModelCheckpoint(dirpath=out / "run", every_n_train_steps=every), *callbacks],
    }  # fmt: skip
    return Trainer(**given | settings)


def fit(trained: Trainer, module: Module | None = None, ckpt_path: str | None = None) -> str:
    """Train; the digest of every bit of the weights."""
    seed_everything(0, verbose=False)
    module = module or Module()
    trained.fit(module, torch.utils.data.DataLoader(Tokens(), batch_size=4), ckpt_path=ckpt_path)
    return digest(module.state_dict())


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def left(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "run/autoeval-exports").iterdir())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "autoeval" and r.levelno == logging.WARNING]


def test_each_checkpoint_that_is_due_is_exported_as_it_was_saved(tmp_path: Path, file: Path) -> None:
    trained = trainer(tmp_path, AutoEvalCallback(file))
    trained.callbacks[-1].save_top_k = -1  # type: ignore[attr-defined]  # ModelCheckpoint: all, to compare with
    fit(trained)
    found = handed_over(tmp_path / "queue")
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6)]
    for (_, step), ticket in found.items():
        assert ticket.manifest.tokens == 64 * step
        assert all(manifest.record(ticket.pin, f.path) == f for f in ticket.manifest.files)
        (saved,) = (tmp_path / "run").glob(f"*step={step}.ckpt")
        theirs = torch.load(saved, weights_only=True)["state_dict"]
        ours = load_file(Path(ticket.pin, "model.safetensors"))
        assert all(torch.equal(theirs[f"net.{name}"], tensor) for name, tensor in ours.items())
    assert left(tmp_path) == [".autoeval"]      # the pins are all that is kept


def own_export(module: Any, directory: str) -> None:
    assert module.global_step == module.trainer.global_step in (2, 4, 6)
    module.net.save_pretrained(directory)


def exported(out: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Step → weights, of what was handed over."""
    found = handed_over(out / "queue").items()
    return {step: load_file(Path(ticket.pin, "model.safetensors")) for (_, step), ticket in found}


@pytest.mark.parametrize(("export", "compiled"), [(None, True), (own_export, False)])
def test_an_average_that_the_checkpoint_has_is_what_is_exported(
    tmp_path: Path, file: Path, export: Any, compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`WeightAveraging` comes before us or after us, and training does not move by it."""
    def module() -> Module:
        seed_everything(0, verbose=False)
        made = Module()
        if compiled:
            made.net.transformer.h[0] = torch.compile(made.net.transformer.h[0], backend="eager")
        return made

    ema, ours = EMAWeightAveraging(decay=0.5), AutoEvalCallback(file, export=export)
    trained = trainer(tmp_path, *((ours, ema) if compiled else (ema, ours)))
    trained.callbacks[-1].save_top_k = -1  # type: ignore[attr-defined]  # ModelCheckpoint: all, to compare with
    weights = fit(trained, module())
    found = exported(tmp_path)
    assert sorted(found) == [2, 4, 6]
    for step, mine in found.items():
        (file_saved,) = (tmp_path / "run").glob(f"*step={step}.ckpt")
        saved = torch.load(file_saved, weights_only=True)
        names = {n.removeprefix("net.").replace("_orig_mod.", ""): n for n in saved["state_dict"]}
        mine = {n.replace("_orig_mod.", ""): tensor for n, tensor in mine.items()}      # of an export of one's own
        assert mine.keys() == names.keys() - {"lm_head.weight"}         # tied
        assert all(torch.equal(saved["state_dict"][names[name]], tensor) for name, tensor in mine.items())
        assert any(not torch.equal(saved["current_model_state"][names[name]], mine[name]) for name in mine)
    assert weights == fit(trainer(tmp_path / "alone", EMAWeightAveraging(decay=0.5)), module())
    assert not warnings(caplog)


def test_weights_alone_are_saved_without_the_average(tmp_path: Path, file: Path) -> None:
    """Lightning asks no callback then; a whole checkpoint that someone saved before tells nothing of this one."""
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "whole.ckpt")

    saver = ModelCheckpoint(dirpath=tmp_path / "run", every_n_train_steps=4, save_weights_only=True)
    fit(trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5), AutoEvalCallback(file), Saves(), saver], steps=5))
    ((step, mine),) = exported(tmp_path).items()
    (file_saved,) = (tmp_path / "run").glob("*step=4.ckpt")
    saved = torch.load(file_saved, weights_only=True)["state_dict"]
    assert step == 4
    assert all(torch.equal(saved[f"net.{name}"], tensor) for name, tensor in mine.items())


def test_training_is_the_same_to_the_bit_and_its_loggers_too(tmp_path: Path, file: Path) -> None:
    def losses(name: str, *callbacks: Any) -> tuple[str, str]:
        logger = CSVLogger(tmp_path / name, version=0)
        trained = trainer(tmp_path / name, *callbacks, logger=logger)
        weights = fit(trained)
        assert trained.loggers == [logger]
        return weights, Path(logger.log_dir, "metrics.csv").read_text()

    assert losses("a") == losses("b", AutoEvalCallback(file))
    assert len(handed_over(tmp_path / "queue")) == 3


def test_without_a_logger_nothing_else_moves(tmp_path: Path, file: Path) -> None:
    seen: list[Any] = []

    class Curious(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append((self.trainer.log_dir, self.logger and self.logger.experiment.add_scalar("a", 1)))

    trained = trainer(tmp_path, AutoEvalCallback(file))
    fit(trained, Curious())
    assert set(seen) == {(str(tmp_path), None)}
    assert trained.loggers == []


def test_unpinned_exports_stay_until_their_tickets_are_done(tmp_path: Path, file: Path) -> None:
    fit(trainer(tmp_path, AutoEvalCallback(file, hook={"pin": "none"})))
    assert left(tmp_path) == [".autoeval", "step-2", "step-4", "step-6"]
    queue = Queue(str(tmp_path / "queue"))
    for token in queue.tokens("pending"):
        if queue.read(token).manifest.step < 6:
            queue.cancel(token, "as good as done")
    fit(trainer(tmp_path, AutoEvalCallback(file), steps=1))
    assert left(tmp_path) == [".autoeval", "step-6"]


def test_a_resumed_training_is_the_same_run(tmp_path: Path, file: Path) -> None:
    fit(trainer(tmp_path, AutoEvalCallback(file), steps=4))
    (last,) = (tmp_path / "run").glob("*.ckpt")
    fit(trainer(tmp_path, AutoEvalCallback(file), steps=8), ckpt_path=str(last))
    found = handed_over(tmp_path / "queue")
    assert sorted(step for _, step in found) == [2, 4, 6, 8]
    assert len({t.manifest.run.id for t in found.values()}) == 1


def test_several_savers_and_a_writer_in_the_background(tmp_path: Path, file: Path) -> None:
    exported: list[int] = []

    def export(module: Any, directory: str) -> None:
        exported.append(module.global_step)
        module.net.save_pretrained(directory)

    savers = [ModelCheckpoint(dirpath=tmp_path / f"run{n}", every_n_train_steps=n, save_last=True) for n in (1, 2)]
    callback = AutoEvalCallback(file, export=export, output_dir=tmp_path / "elsewhere")
    fit(trainer(tmp_path, callbacks=[callback, *savers], plugins=[AsyncCheckpointIO()]))
    assert exported == [2, 4, 6]
    paths = {t.manifest.path for t in handed_over(tmp_path / "queue").values()}
    assert paths == {str(tmp_path / "elsewhere/autoeval-exports" / f"step-{n}") for n in (2, 4, 6)}


@pytest.mark.parametrize("part", ["whole", "layers"])
def test_a_compiled_model_is_exported_by_its_own_names(tmp_path: Path, part: str) -> None:
    module = Module()
    names = set(module.net.state_dict()) - {"lm_head.weight"}       # tied
    if part == "whole":
        module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    else:
        module.net.transformer.h[0] = torch.compile(module.net.transformer.h[0], backend="eager")
    adapter.save_pretrained(module, str(tmp_path))
    assert set(load_file(tmp_path / "model.safetensors")) == names


def test_an_export_that_fails_costs_a_warning(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def export(module: Any, directory: str) -> None:
        Path(directory, "config.json").write_text("{}")
        raise RuntimeError("out of memory")

    trained = trainer(tmp_path, AutoEvalCallback(file, export=export))
    fit(trained)
    assert trained.global_step == 6
    assert [m for m in warnings(caplog) if "out of memory" in m]
    assert not handed_over(tmp_path / "queue")
    assert not [p for p in (tmp_path / "run").rglob("*") if ".new-" in p.name]


def test_what_cannot_work_is_said_before_the_first_step(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"Module has several attributes with save_pretrained \(net, ema\).*export="):
        fit(trainer(tmp_path, AutoEvalCallback(file)), Module(ema=small()))
    with pytest.raises(ConfigError, match="LightningModule has no attribute with one"):
        adapter.model_of(LightningModule())
    assert not warnings(caplog)

    # The last is a stand-in for FSDP, of its name alone: that needs an accelerator.
    plain: dict[str, Callable[[], Trainer]] = {
        "no ModelCheckpoint": lambda: trainer(
            tmp_path, callbacks=[AutoEvalCallback(file)], enable_checkpointing=False
        ),
        "fast_dev_run": lambda: trainer(tmp_path, AutoEvalCallback(file), fast_dev_run=True),
        "submit converted checkpoints": lambda: trainer(
            tmp_path, AutoEvalCallback(file), strategy=type("FSDPStrategy", (SingleDeviceStrategy,), {})("cpu")
        ),
    }  # fmt: skip
    for said, make in plain.items():
        caplog.clear()
        fit(make())
        (message,) = warnings(caplog)
        assert said in message
    assert "FSDPStrategy" in adapter.SHARDED
    assert FSDPStrategy.__name__ in adapter.SHARDED
    assert not (tmp_path / "queue").exists()


def test_an_error_in_training_is_raised_and_what_was_saved_is_handed_over(tmp_path: Path, file: Path) -> None:
    class Fails(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                raise RuntimeError("a loss of nan")

    trained = trainer(tmp_path, AutoEvalCallback(file))
    with pytest.raises(RuntimeError, match="a loss of nan"):
        fit(trained, Fails())
    assert sorted(handed_over(tmp_path / "queue")) == [("quick", 2), ("quick", 4)]
    assert trained.loggers == []


@pytest.mark.slow
def test_the_example_reaches_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    example("lightning", out)
    checked(out)
    monkeypatch.setenv("EXAMPLE_OUT", str(out))
    assert all(r.evaluations[0].scores[0].value > 10_000 for r in scored("lightning", out))     # bytes of weights


PACKAGE = """
import sys
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from autoeval_hooks import lightning as adapter

assert issubclass(adapter.AutoEvalCallback, Callback) and issubclass(adapter._Listener, DummyLogger)
assert "lightning.pytorch" not in sys.modules

class Net(torch.nn.Linear):
    def save_pretrained(self, directory):
        open(directory + "/config.json", "w").write("{}")
        open(directory + "/model.safetensors", "wb").write(self.weight.detach().numpy().tobytes())

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net(4, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

file, out, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=4, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
    callbacks=[ModelCheckpoint(dirpath=out, every_n_train_steps=2), adapter.AutoEvalCallback(file)],
).fit(Module(), torch.utils.data.DataLoader(torch.rand(64, 4), batch_size=4))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_the_older_package_on_one_process_and_on_two(tmp_path: Path, file: Path, devices: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(PACKAGE)
    env = {k: v for k, v in offline(tmp_path).items() if k != "RANK"} | {"MASTER_ADDR": "127.0.0.1"}
    argv = [sys.executable, str(script), str(file), str(tmp_path / "run"), str(devices)]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "autoeval:" not in done.stderr
    assert sorted(handed_over(tmp_path / "queue")) == [("quick", 2), ("quick", 4)]
    assert os.listdir(tmp_path / "run/autoeval-exports") == [".autoeval"]
