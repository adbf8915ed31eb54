"""`make demo`: the main job on real parts, and what it says when something is missing.

AUTOEVAL_DEMO_QUICK=1 lowers the number of steps and instances, and nothing else.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval_runner.results import store
from tests import wandb_backend, wandb_log

ROOT = Path(__file__).parents[2]
QUICK = os.environ.get("AUTOEVAL_DEMO_QUICK") == "1"
BENCHMARKS = {"autoeval_bpb.python", "next_line", "dyck_language.2"}
"""Of the suite `quick`; `judge` has next_line, too."""

full = [pytest.mark.slow, pytest.mark.helm, pytest.mark.timeout(900)]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module     # dataclasses look there
    spec.loader.exec_module(module)
    return module


demo = load(ROOT / "examples/demo.py")
data = load(ROOT / "examples/huggingface/data.py")
PLAN = demo.QUICK if QUICK else demo.Plan()


def command(out: Path) -> list[str]:
    return [sys.executable, str(ROOT / "examples/demo.py"), "--out", str(out), *(["--quick"] if QUICK else [])]


def environment() -> dict[str, str]:
    """W&B variables of another run must not reach the demo's, and no judge is paid for a test."""
    found = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "JUDGE_"))}
    return found | {"WANDB_RUN_ID": "another", "WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a demo left, run once for this module."""
    path: Path = tmp_path_factory.mktemp("demo") / "demo output"     # a space, as in many a home directory
    done = subprocess.run(command(path), env=environment(), capture_output=True, text=True, timeout=880, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    (path / "stdout").write_text(done.stdout)
    return path


def scores(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestWhatComesOut:
    pytestmark = full

    def test_every_checkpoint_has_every_score(self, out: Path) -> None:
        rows = [row for row in scores(out) if row["suite"] == "quick"]
        assert list(rows[0])[:9] == ["run", "step", "suite", "benchmark", "metric", "split", "value", "stderr", "n"]
        assert len(PLAN.checkpoints) >= 5
        expected = {(step, benchmark) for step in PLAN.checkpoints for benchmark in BENCHMARKS}
        assert {(int(r["step"]), r["benchmark"]) for r in rows} == expected
        assert len(rows) == len(expected)
        asked = {"autoeval_bpb.python": PLAN.excerpts, "next_line": PLAN.questions, "dyck_language.2": 100}
        assert {r["benchmark"]: int(r["n"]) for r in rows} == asked

    def test_every_checkpoint_was_judged(self, out: Path) -> None:
        """By the stand-in; how well this small model does is not for a test to say."""
        rows = [r for r in scores(out) if name(r) == "bench/judge/next_line/win_rate"]
        assert [int(r["step"]) for r in rows] == PLAN.checkpoints
        assert {int(r["n"]) for r in rows} == {min(PLAN.questions, data.JUDGED)}
        assert all(0 <= float(r["value"]) <= 1 for r in rows)
        assert all(float(r["stderr"]) >= 0 for r in rows)
        assert "the judge is a stand-in" in (out / "stdout").read_text()
        assert demo.judges(out) == {"stand-in-judge"}

    def test_bits_per_byte_falls(self, out: Path) -> None:
        values = [float(r["value"]) for r in scores(out) if r["metric"] == "bits_per_byte"]
        errors = [float(r["stderr"]) for r in scores(out) if r["metric"] == "bits_per_byte"]
        assert values[0] - values[-1] > 3 * max(errors)
        assert all(after < before + 0.02 for before, after in pairwise(values))    # no zigzag: one and the same text
        assert all(1.0 < value < 8.0 for value in values)

    def test_retention_deleted_checkpoints_that_were_not_evaluated_yet(self, out: Path) -> None:
        done = [r for r in store.collect(out / "queue").results if r.suite == "quick"]
        results = sorted(done, key=lambda r: r.step)
        assert [r.step for r in results] == PLAN.checkpoints
        assert [p.name for p in (out / "run").glob("checkpoint-*")] == [f"checkpoint-{PLAN.steps}"]
        # The Trainer rotates before it says that it saved, so the time of a save is after the deletion before it.
        late = [this.step for this, after in pairwise(results) if this.started_at > after.saved_at]
        assert late, "each evaluation began before the next save"
        assert list((out / "run/.autoeval/pins").iterdir()) == []    # and nothing is kept for longer than needed

    def test_the_run_holds_each_training_row_and_each_score_at_its_step(self, out: Path) -> None:
        logs = wandb_log.logs(out / "wandb")
        rows = [row for log in logs for row in wandb_log.rows(log)]
        assert len({log.parent.name.split("-")[-1] for log in logs}) == 1      # one run, not one for the scores
        training = [row for row in rows if "train/loss" in row]
        assert [row["train/global_step"] for row in training] == list(range(10, PLAN.steps + 1, 10))
        assert charted(rows) == expected_points(out)
        for step in PLAN.checkpoints:
            tokens = [row["bench/tokens"] for row in rows if row.get("bench/step") == step]
            assert tokens == [pytest.approx(step * 4 * 256 / 1e9)] * 2     # one row for each suite
        axes = [wandb_log.definitions(log) for log in logs]
        assert all(any(found.get(key) == "bench/step" for found in axes) for _, key in expected_points(out))

    def test_wandb_sync_makes_one_run_of_it(self, out: Path, tmp_path: Path) -> None:
        """Against the loopback backend of these tests, which stands in for W&B's service."""
        shutil.copytree(out / "wandb", tmp_path / "wandb", symlinks=True)      # `sync` marks what it has sent
        directories = [log.parent for log in wandb_log.logs(tmp_path / "wandb")]
        run_id = directories[0].name.split("-")[-1]
        with wandb_backend.backend() as service:
            env = wandb_backend.environment(tmp_path / "sync", "online", service.url)
            wandb = Path(sys.executable).with_name("wandb")
            subprocess.run([wandb, "sync", *directories], env=env, check=True, capture_output=True, timeout=120)
            run = service.run("autoeval-demo", run_id)
        rows = run.history()
        assert run.overwritten == 0
        assert [row["train/global_step"] for row in rows if "train/loss" in row] == list(range(10, PLAN.steps + 1, 10))
        assert charted(rows) == expected_points(out)
        assert run.display_name == "python-sources"

    def test_the_report_needs_no_network(self, out: Path) -> None:
        page = (out / "report/index.html").read_text()
        assert outside_references(page) == []
        assert all(benchmark in page for benchmark in BENCHMARKS)
        assert outside_references('<script src="https://cdn.example/x.js"></script>') == ["https://cdn.example/x.js"]

    def test_it_says_what_it_does_and_where_to_look(self, out: Path) -> None:
        said = (out / "stdout").read_text()
        assert "minutes on two cores" in said.splitlines()[0]
        for path in ("scores.csv", "report/index.html", "wandb"):
            assert str(out / path) in said
            assert (out / path).exists()
        for row in scores(out):
            if (row["suite"], row["benchmark"], row["metric"]) in demo.SCORES.values():
                assert f"{float(row['value']):.3f} ± " in said

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda rows: [r for r in rows if (r["step"], r["suite"]) != (str(PLAN.steps), "judge")],
             f"no score of judge's win rate at step {PLAN.steps}"),
            (lambda rows: [r | {"value": "0.123"} if r["benchmark"] == "next_line" else r for r in rows],
             "is not in the W&B run as it is"),
        ],
        ids=["a score is missing", "the W&B run says otherwise"],
    )  # fmt: skip
    def test_it_fails_on(
        self, out: Path, tmp_path: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]], message: str
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(out, copy)
        demo.check(PLAN, copy)
        write_scores(copy, change(scores(out)))
        with pytest.raises(demo.DemoError, match=message):
            demo.check(PLAN, copy)

    def test_it_fails_when_nothing_was_learned(
        self, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(out, copy)
        flat = [r | {"value": "2.5"} if r["metric"] == "bits_per_byte" else r for r in scores(out)]
        write_scores(copy, flat)
        told = [{"bench/step": int(r["step"]), name(r): float(r["value"])} for r in flat]
        monkeypatch.setattr(demo, "charts", lambda path: told)      # stands in for a W&B run with the same scores
        with pytest.raises(demo.DemoError, match="did not fall"):
            demo.check(PLAN, copy)


def charted(rows: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """What a W&B run shows: (bench/step, metric) → value, less the standard errors and counts."""
    return {
        (row["bench/step"], key): value
        for row in rows for key, value in row.items()
        if key.count("/") > 2 and not key.endswith(("/stderr", "/n"))
    }  # fmt: skip


def expected_points(out: Path) -> dict[tuple[int, str], float]:
    return {(int(r["step"]), name(r)): float(r["value"]) for r in scores(out)}


def name(row: dict[str, str]) -> str:
    return f"bench/{row['suite']}/{row['benchmark']}/{row['metric']}"


def write_scores(out: Path, rows: list[dict[str, str]]) -> None:
    with (out / "scores.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def outside_references(page: str) -> list[str]:
    """What a browser would load for this page: sources, style sheets and imports."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loads = {"link": "href", "object": "data"}.get(tag, "src")
            found.extend(value for key, value in attrs if key == loads and value and not value.startswith("data:"))

        def handle_data(self, text: str) -> None:
            if self.cdata_elem == "style" and ("@import" in text or "url(" in text):
                found.append(text)

    Reader().feed(page)
    return found


@pytest.mark.slow
@pytest.mark.helm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGKILL and not shutil.which("setpriv"):
        pytest.skip("nothing ties children to a killed parent without util-linux's setpriv")
    place = tmp_path / "out"
    child = subprocess.Popen(
        command(place), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),    # ignored where the tests run behind `&`
    )  # fmt: skip
    try:
        wait_until(lambda: child.poll() is not None or evaluating(place), 150)
        assert child.poll() is None, "it ended before HELM had started"
        assert len(processes_of(place)) >= 3    # training, the runner, HELM, and what they started
    finally:
        child.send_signal(number)
        said = child.communicate(timeout=60)[0].decode()
    assert child.returncode not in (0, None)
    wait_until(lambda: not processes_of(place), 30)
    if number == signal.SIGINT:
        assert "interrupted; nothing was left running" in said
        assert "Traceback" not in said


def evaluating(place: Path) -> bool:
    """HELM is at work, and training still goes on."""
    logs = list((place / "queue/logs").glob("*helm*"))
    return any(log.stat().st_size for log in logs) and any("train.py" in c for c in processes_of(place).values())


def processes_of(place: Path) -> dict[int, str]:
    """The command lines of the processes that were started for this output directory, by pid."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"EXAMPLE_OUT={place}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def wait_until(is_so: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.2)


class TestOutputDirectory:
    """Only what a demo wrote is ever removed."""

    def test_starts_over_in_its_own(self, tmp_path: Path) -> None:
        place = tmp_path / "demo_output"
        with demo.claimed(place):
            (place / "run/checkpoint-1").mkdir(parents=True)
            (place / "scores.csv").touch()
            (place / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
        with demo.claimed(place):
            assert [p.name for p in place.iterdir()] == [demo.MARK]
        assert (tmp_path / "elsewhere").is_dir()

    def test_refuses_anything_else(self, tmp_path: Path) -> None:
        foreign = tmp_path / "thesis"
        foreign.mkdir()
        (foreign / "chapter1.tex").write_text("years of work")
        with demo.claimed(tmp_path / "other"):
            (tmp_path / "link").symlink_to(tmp_path / "other")      # a demo's own, but not what was named
        (tmp_path / "file").touch()
        for place in (foreign, tmp_path / "link", tmp_path / "file"):
            with pytest.raises(demo.DemoError, match="choose another by --out"), demo.claimed(place):
                pass
        assert (foreign / "chapter1.tex").read_text() == "years of work"

    def test_two_demos_at_once(self, tmp_path: Path) -> None:
        with demo.claimed(tmp_path / "out") as place:
            (place / "scores.csv").touch()
            with pytest.raises(demo.DemoError, match="another demo is writing"), demo.claimed(place):
                pass
            assert (place / "scores.csv").exists()


class TestParts:
    def process(self, tmp_path: Path, code: str) -> Any:
        return demo.Process("part", [sys.executable, "-c", code], tmp_path / "part.log", dict(os.environ))

    def test_a_part_that_fails_shows_its_last_words(self, tmp_path: Path) -> None:
        with (
            pytest.raises(demo.DemoError, match=r"part failed with status 3.*\n.*out of memory"),
            self.process(tmp_path, "import sys; print('out of memory'); sys.exit(3)") as part,
        ):
            part.finish()

    def test_a_part_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "PATIENCE_S", 0.5)
        with (
            pytest.raises(demo.DemoError, match="part is not done"),
            self.process(tmp_path, "import time; time.sleep(60)") as part,
        ):
            part.finish()
        assert part._child.returncode == -signal.SIGTERM

    def test_a_runner_that_ends_early(self, tmp_path: Path) -> None:
        with (
            self.process(tmp_path, "print('I quit')") as runner,
            self.process(tmp_path, "import time; time.sleep(60)") as training,
        ):
            runner.finish()
            with pytest.raises(demo.DemoError, match=r"runner ended early(.|\n)*I quit"):
                demo.Watch(demo.Plan()).until_done(training, runner, tmp_path)

    def test_a_training_that_hands_nothing_over(self, tmp_path: Path) -> None:
        with (
            self.process(tmp_path, "import time; time.sleep(60)") as runner,
            self.process(tmp_path, "print('autoeval: warning')") as training,
        ):
            training.finish()
            with pytest.raises(demo.DemoError, match=r"handed over 0 of 12 tickets(.|\n)*autoeval: warning"):
                demo.Watch(demo.Plan()).until_done(training, runner, tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    prepare(path)
    return path


def prepare(path: Path) -> None:
    arguments = ["--out", str(path), "--excerpts", "30", "--questions", "30"]
    subprocess.run([sys.executable, str(ROOT / "examples/huggingface/data.py"), *arguments], check=True, timeout=120)


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestData:
    def test_held_out_text_is_never_trained_on(self, prepared: Path) -> None:
        import numpy as np
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
        text = tokenizer.decode(np.load(prepared / "train.npy").tolist())
        excerpts = [r["text"] for r in records(prepared / "held_out.jsonl")]
        assert len(set(excerpts)) == 30
        assert [e for e in excerpts if e in text] == []
        questions = records(prepared / "next_line.jsonl")
        right = [q["input"]["text"] + " " + next(r["output"]["text"] for r in q["references"] if r["tags"])
                 for q in questions]  # fmt: skip
        assert [q for q in right if q in text] == []

    def test_split_by_content(self, tmp_path: Path) -> None:
        files = data.source_files()
        root = data.sysconfig.get_paths()["stdlib"]
        assert not [f for f in files if {"site-packages", "test", "tests"} & set(f.relative_to(root).parts)]
        train, held_out = data.read(files)
        backwards = data.read(files[::-1])
        assert (sorted(train), sorted(held_out)) == (sorted(backwards[0]), sorted(backwards[1]))
        assert not set(train) & set(held_out)
        assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.2

    def test_tokenizer_is_exact(self, prepared: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
        excerpts = [r["text"] for r in records(prepared / "held_out.jsonl")]
        for text in [*excerpts, "\tnaïve  café \n\n  日本 🙂\r\n", "a  b , c . d 's"]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode("<|bos|>x")[0] == tokenizer.bos_token_id
        assert all(len(tokenizer.encode(text)) < data.CONTEXT for text in excerpts)     # and one start token

    def test_questions(self, prepared: Path) -> None:
        for question in records(prepared / "next_line.jsonl"):
            answers = [r["output"]["text"] for r in question["references"]]
            assert len(set(answers)) == 4
            assert sum(r["tags"] == ["correct"] for r in question["references"]) == 1
        first = [q["references"][0]["tags"] == ["correct"] for q in records(prepared / "next_line.jsonl")]
        assert 0 < sum(first) < 20      # no place gives the answer away

    def test_the_same_on_every_run(self, prepared: Path, tmp_path: Path) -> None:
        prepare(tmp_path)       # another process, with hashes of its own
        for name in ("tokenizer/tokenizer.json", "train.npy", "held_out.jsonl", "next_line.jsonl"):
            assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()

    def test_held_out_text_that_training_sees_is_not_used(self) -> None:
        texts = ["".join(f"    value_{i} = compute_something({i})\n" for i in range(200))]
        with pytest.raises(SystemExit, match="only 0 of 3 excerpts could be made"):
            list(data.excerpts(None, texts, "".join(texts), 3))
        with pytest.raises(SystemExit, match="only 0 of 3 questions could be made"):
            list(data.questions(texts, "".join(texts), 3))
        assert len(list(data.questions(texts, "", 3))) == 3

    def test_no_sources(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "os.py").write_text("import abc\n")
        monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(SystemExit, match="too few Python sources"):
            data.source_files()
