"""Secrets are planted in the environment and the configuration; then nothing that was written or said holds one."""

from __future__ import annotations

import os
import secrets as random
import subprocess
import sys
from pathlib import Path

import pytest

from autoeval_hooks.queue import Queue
from eval_runner import secrets
from tests.wandb_backend import environment

ROOT = Path(__file__).parents[2]
CONFIG = """
queue: queue
run: {project: p, tokenizer: tokenizer}
runner: {max_attempts: 1, breaker: 100}
suites:
  quick:
    every_steps: 2
    evaluators: [{type: helm, entries: [a], plugins: ["${PLANTED_DSN}"]}]
sinks: [{type: wandb, api_key_env: JUDGE_ACCESS}]
"""


@pytest.fixture
def planted() -> dict[str, str]:
    value = random.token_hex(20)
    return {
        "WANDB_API_KEY": value[::-1],
        "HF_TOKEN": f"hf_{value}",
        "OPENAI_API_KEY": f"sk-{value}",
        "JUDGE_ACCESS": f"judge-{value}",               # named by api_key_env alone
        "PLANTED_DSN": f"dsn-{value}-" + "x" * 60,      # in the configuration as ${PLANTED_DSN}, and long
        "HTTPS_PROXY": f"http://me:{value}@127.0.0.1:9",
    }


def test_no_file_and_no_output_holds_a_secret(tmp_path: Path, planted: dict[str, str]) -> None:
    config = tmp_path / "autoeval.yaml"
    config.write_text(CONFIG)
    (tmp_path / "tokenizer").mkdir()
    env = environment(tmp_path / "w", "offline") | planted | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    said: dict[str, str] = {}

    def run(name: str, *argv: str, status: int | None = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *argv], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert status in (None, done.returncode), (name, done.stdout, done.stderr[-3000:])
        said[name] = done.stdout + done.stderr
        return said[name]

    def cli(name: str, *argv: str, status: int | None = 0) -> str:
        return run(name, "tests.secrets_program", "cli", *argv, "--config", str(config), status=status)

    run("train", "tests.secrets_program", "train", str(config), str(tmp_path / "out"))
    extra = str(tmp_path / "out" / "checkpoint-2")
    run("submit", "autoeval_hooks", "submit", extra, "--step", "8", "--config", str(config))
    run("hooks doctor", "autoeval_hooks", "doctor", "--config", str(config))
    cli("run", "run", "--drain", "--verbose", status=1)
    assert sorted(t.state for t in Queue(str(tmp_path / "queue")).tokens()) == ["done", "done", "failed", "failed"]
    cli("status", "status")
    cli("status --json", "status", "--json")
    for step in ("2", "4", "6"):
        cli(f"explain {step}", "explain", step)
    cli("report", "report", "--out", str(tmp_path / "report"))
    cli("validate", "validate")
    cli("doctor", "doctor", status=None)
    cli("cancel", "cancel", "--step", "99")
    refused = CONFIG.replace("entries: [a]", "entries: [a], torch_dtype: '${PLANTED_DSN}'")
    config.write_text(refused.replace("quick:", "real:"))
    cli("validate, refused", "validate", status=2)
    cli("run, refused", "run", "--drain", status=2)

    # The values came as far as our own files: that they are not there is the mask's doing.
    assert "torch_dtype: '***" in said["validate, refused"]
    assert "plugins[0]: '***" in said["status"]
    assert "the child says:" in said["status"]
    logs = b"".join(p.read_bytes() for p in (tmp_path / "queue" / "logs").iterdir())
    assert logs.count(b"PLANTED_DSN ***") == logs.count(b"HF_TOKEN ***") == logs.count(b"WANDB_API_KEY ***") >= 4
    assert list(tmp_path.glob("w/wandb/offline-run-*"))
    values = {name: value.partition("me:")[2].partition("@")[0] or value for name, value in planted.items()}
    starts = {name: value[:30] for name, value in values.items()}
    found = [f"{name} in output of {what}" for what, text in said.items() for name, v in starts.items() if v in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        data = path.read_bytes()
        found += [f"{name} in {path}" for name, value in starts.items() if value.encode() in data]
    assert found == []
    assert len(files) > 50


def test_a_veil_masks_what_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcabcabd")
    text = b"x abcabcabcabd y abcabcab z abcabcabd"
    for size in range(1, len(text)):
        veil = secrets.Veil()
        out = b"".join(veil.feed(text[i : i + size]) for i in range(0, len(text), size)) + veil.rest()
        assert out == b"x abc*** y abcabcab z ***"
    veil = secrets.Veil()
    assert veil.feed(b"progress 5 %\r") == b"progress 5 %\r"        # nothing is held back that begins no secret


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("X_API_KEY", "0123456789", True), ("HF_TOKEN", "0123456789", True), ("DB_PASSWORD", "0123456789", True),
        ("TOKEN", "0123456789", True), ("SOME_SECRET", "true", False), ("MY_TOKEN", "/run/secrets/token", False),
        ("KEYBOARD", "0123456789", False), ("TOKENIZERS_PARALLELISM", "0123456789", False),
    ],
)  # fmt: skip
def test_which_variables_are_secrets(monkeypatch: pytest.MonkeyPatch, name: str, value: str, hidden: bool) -> None:
    for other in [n for n in os.environ if n not in ("PATH", "HOME")]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert secrets.masked(f"is {value}!") == ("is ***!" if hidden else f"is {value}!")


def test_known_kinds_of_keys_are_masked_wherever_they_come_from() -> None:
    text = f"sk-{'a' * 30} hf_{'b' * 34} https://me:pass@host/x http://host/y"
    assert secrets.masked(text) == "*** *** https://***@host/x http://host/y"
