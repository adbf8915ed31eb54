"""When a plan is made anew, and what it is made from. `process.run` is a stand-in for HELM's own processes here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import environments, process
from eval_runner.evaluators.base import Context, Job, Limits, Outcome, Parts
from eval_runner.evaluators.helm import HelmEvaluator
from eval_runner.evaluators.written import digest
from eval_runner.process import Stopped

NAN = "Removing stat m because its value is NaN\n"


class StandIn:
    """Answers as HELM's parser, probe and run do; each entry is a run of one instance, or, named ``many``, two."""

    def __init__(self) -> None:
        self.probes: list[dict[str, Any]] = []
        self.limits: dict[str, Any] = {}
        self.ran: list[list[str]] = []
        self.answer: dict[str, Any] = {}
        self.nan_in = self.missing_in = self.stops_in = self.fails_in = self.torn_in = self.dies_after = ""

    def run(
        self, argv: list[str], *, log: Path, cwd: Path, on_tick: Callable[[], None] = lambda: None, **limits: Any
    ) -> int:
        if argv[1] == "-c":
            (cwd / "hocon.json").write_text(Path(argv[3]).read_text())
        elif argv[1] == "-m":
            self.limits = limits
            return self._evaluate(log, cwd, on_tick)
        else:
            self.probes.append(json.loads(Path(argv[2]).read_text()))
            run = {"metric": "m", "split": "test", "lower_is_better": {}}
            entries = [{"runs": [run] * (1 + e.startswith("many"))} for e in self.probes[-1]["entries"]]
            Path(argv[3]).write_text(json.dumps({"versions": {}, "entries": entries} | self.answer))
        return 0

    def _evaluate(self, log: Path, cwd: Path, on_tick: Callable[[], None]) -> int:
        entries = json.loads((cwd / "runs.conf").read_text())["entries"]
        self.ran.append([entry["description"].split(":")[0] for entry in entries])
        runs = [(e, number) for e in entries for number in range(1 + e["description"].startswith("many"))]
        for entry, number in runs:
            argument = f"number={number}," if entry["description"].startswith("many") else ""
            name = f"{entry['description']},{argument}groups={entry['groups'][0]}".replace("/", "_")
            spec = name.split(":")[0]
            directory = cwd / "output" / "runs" / "autoeval" / name
            directory.mkdir(parents=True)
            on_tick()
            if spec == self.stops_in:
                raise Stopped("told to")
            if spec == self.fails_in:
                continue
            metrics = ["num_instances"] if spec == self.missing_in else ["num_instances", "m"]
            rows = [{"name": {"name": m, "split": "test"}, "count": 1, "sum": 1.0, "mean": 1.0} for m in metrics]
            (directory / "stats.json").write_text(json.dumps(rows))
            (directory / "per_instance_stats.json").write_text("[]")
            with log.open("a") as file:
                file.write(f"Running {name} {{\n" + (NAN if spec == self.nan_in else ""))
            if spec == self.torn_in:
                (directory / "per_instance_stats.json").write_text("[{")
            if spec == self.dies_after:
                return -9
        return int(bool(self.fails_in))


@pytest.fixture
def helm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(process, "run", stand_in.run)
    monkeypatch.setattr(environments, "find", lambda *_: tmp_path / "env" / "bin" / "python")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return stand_in


def _evaluator(base: Path, **settings: object) -> HelmEvaluator:
    return HelmEvaluator(settings, Context(base, base / "envs", "suites.quick.evaluators[0]", "autoeval.yaml"))


def _job(base: Path, name: str, finished: Parts | None = None) -> Job:
    (base / name).mkdir()
    return Job(base, base, "model", base / name, base / f"{name}.log", finished=finished or Parts())


class Remembers(Parts):
    """Parts in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Outcome] = {}

    def get(self, key: str) -> Outcome | None:
        return self.kept.get(key)

    def put(self, key: str, outcome: Outcome) -> None:
        assert key not in self.kept
        self.kept[key] = outcome


def _entries(*names: str) -> str:
    return json.dumps({"entries": [{"description": name} for name in names]})


def test_an_edited_entries_file_is_what_runs_and_what_is_recorded(helm: StandIn, tmp_path: Path) -> None:
    file, plugin, schema = tmp_path / "runs.conf", tmp_path / "plugin.py", tmp_path / "schema.yaml"
    file.write_text(_entries("old"))
    plugin.write_text("")
    schema.write_text("{}")
    one = _evaluator(tmp_path, entries_file=file.name, plugins=[plugin.name], schema=schema.name)
    one.check()
    first = one.evaluate(_job(tmp_path, "a"))
    assert len(helm.probes) == 1
    file.write_text(_entries("new"))
    second = one.evaluate(_job(tmp_path, "b"))
    assert helm.ran == [["old"], ["new"]]
    assert first.evaluation.provenance.keys() == {str(file), str(plugin), str(schema)}
    assert first.evaluation.provenance[str(file)] != second.evaluation.provenance[str(file)] == digest(file)
    for number, path in enumerate((plugin, schema), 3):
        path.write_text("# changed")
        one.check()
        assert len(helm.probes) == number
    file.unlink()
    with pytest.raises(ConfigError, match=r"^autoeval.yaml: suites.quick.evaluators\[0\].entries_file: .* not exist"):
        one.check()


def test_data_are_digested_in_each_evaluation_and_make_no_new_plan(helm: StandIn, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    one = _evaluator(tmp_path, entries=["custom:path=data.jsonl"])
    digests = [one.evaluate(_job(tmp_path, "a")).evaluation.provenance[str(data)]]
    data.write_text("two")
    digests.append(one.evaluate(_job(tmp_path, "b")).evaluation.provenance[str(data)])
    assert digests[0] != digests[1] == digest(data)
    assert len(helm.probes) == 1


def test_the_home_directory_is_known_in_every_path(helm: StandIn, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "runs.conf").write_text(_entries("one"))
    (home / "plugin.py").write_text("")
    (home / "schema.yaml").write_text("{}")
    _evaluator(tmp_path, entries_file="~/runs.conf", plugins=["~/plugin.py"], schema="~/schema.yaml").check()
    assert helm.probes[0]["plugins"][1:] == [str(home / "plugin.py")]
    assert helm.probes[0]["schema"] == str(home / "schema.yaml")


@pytest.mark.parametrize("written", ["schema_clasic.yaml", "/schema_clasic.yaml", "~/schema_clasic.yaml"])
def test_a_schema_that_is_nowhere(helm: StandIn, tmp_path: Path, written: str) -> None:
    helm.answer = {"known_schemas": ["schema_classic.yaml", "schema_lite.yaml"]}
    with pytest.raises(ConfigError) as caught:
        _evaluator(tmp_path, entries=["one"], schema=written).check()
    said = str(caught.value)
    assert said.startswith("autoeval.yaml: suites.quick.evaluators[0].schema: /")
    assert f"is no file, and HELM has no schema {written!r}; did you mean 'schema_classic.yaml'?" in said


@pytest.mark.parametrize(("nan_in", "error"), [("two", CheckpointError), ("one", ConfigError)])
def test_another_runs_nan_does_not_excuse_a_missing_metric(
    helm: StandIn, tmp_path: Path, nan_in: str, error: type[Exception]
) -> None:
    helm.missing_in, helm.nan_in = "two", nan_in
    with pytest.raises(error, match=r"^two: "):
        _evaluator(tmp_path, entries=["one", "two"]).evaluate(_job(tmp_path, "a"))


def test_an_attempt_that_is_cut_short_keeps_what_helm_has_finished(helm: StandIn, tmp_path: Path) -> None:
    one, parts = _evaluator(tmp_path, entries=["one", "two", "three"]), Remembers()
    helm.stops_in = "three"
    with pytest.raises(Stopped):
        one.evaluate(_job(tmp_path, "a", parts))
    assert len(parts.kept) == 2
    helm.stops_in = ""
    parts.kept = {key: replace(o, evaluation=replace(o.evaluation, seconds=100.0)) for key, o in parts.kept.items()}
    found = one.evaluate(_job(tmp_path, "b", parts))
    assert helm.ran == [["one", "two", "three"], ["three"]]
    assert [s.benchmark for s in found.evaluation.scores] == ["one", "two", "three"]
    assert found.evaluation.versions["autoeval resume"] == "2 of 3 entries are of an earlier attempt"
    assert 200 < found.evaluation.seconds < 260         # what all of it took
    again = one.evaluate(_job(tmp_path, "c", parts))
    assert len(helm.ran) == 2
    assert again.evaluation.scores == found.evaluation.scores
    assert "autoeval resume" not in one.evaluate(_job(tmp_path, "d")).evaluation.versions


def test_a_run_that_fails_has_those_beside_it_kept(helm: StandIn, tmp_path: Path) -> None:
    one, parts = _evaluator(tmp_path, entries=["one", "two", "three"]), Remembers()
    helm.fails_in = "two"
    with pytest.raises(AutoEvalError, match=r"HELM failed at .*entries\[1\] \(two\): exit status 1"):
        one.evaluate(_job(tmp_path, "a", parts))
    helm.fails_in = ""
    assert len(one.evaluate(_job(tmp_path, "b", parts)).evaluation.scores) == 3
    assert helm.ran == [["one", "two", "three"], ["two"]]


def test_an_entry_of_several_runs_is_kept_only_with_all_of_them(helm: StandIn, tmp_path: Path) -> None:
    """HELM is killed between two of them: the first is no answer for all."""
    one, parts = _evaluator(tmp_path, entries=["one", "many"]), Remembers()
    helm.dies_after = "many"
    with pytest.raises(AutoEvalError, match=r"HELM failed at .*entries\[1\] \(many\)"):
        one.evaluate(_job(tmp_path, "a", parts))
    assert len(parts.kept) == 1
    helm.dies_after = ""
    found = one.evaluate(_job(tmp_path, "b", parts))
    assert helm.ran == [["one", "many"], ["many"]]
    assert len(found.evaluation.scores) == 3


def test_what_is_no_number_or_torn_is_not_kept_and_told_in_every_attempt(helm: StandIn, tmp_path: Path) -> None:
    one, parts = _evaluator(tmp_path, entries=["one", "two", "three"]), Remembers()
    helm.missing_in = helm.nan_in = "two"
    helm.stops_in = "three"
    with pytest.raises(Stopped):
        one.evaluate(_job(tmp_path, "a", parts))
    helm.stops_in = ""
    for attempt, ran in (("b", ["two", "three"]), ("c", ["two", "three"])):
        with pytest.raises(CheckpointError, match=r"^two: m is not a number"):
            one.evaluate(_job(tmp_path, attempt, parts))
        assert helm.ran[-1] == ran
    assert len(parts.kept) == 1
    helm.missing_in = helm.nan_in = ""
    helm.torn_in = "two"
    with pytest.raises(AutoEvalError, match="left no readable results"):
        one.evaluate(_job(tmp_path, "d", parts))
    assert len(parts.kept) == 1


@pytest.mark.parametrize(
    "change", ["data", "plugin", "versions", "instances", "metric", "trust", "entry", "tokenizer"]
)
def test_a_part_is_taken_only_where_all_that_makes_it_is_the_same(
    helm: StandIn, tmp_path: Path, change: str
) -> None:
    (tmp_path / "data.jsonl").write_text("one")
    (tmp_path / "plugin.py").write_text("")
    entries, settings = ["custom:path=data.jsonl", "last"], {"plugins": ["plugin.py"], "max_instances": 10}
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    parts = Remembers()
    helm.stops_in = "last"
    with pytest.raises(Stopped):
        _evaluator(tmp_path, entries=entries, **settings).evaluate(
            replace(_job(tmp_path, "a", parts), tokenizer=tokenizer)
        )
    helm.stops_in = ""
    if change == "data":
        (tmp_path / "data.jsonl").write_text("two")
    elif change == "plugin":
        (tmp_path / "plugin.py").write_text("# two")
    elif change == "versions":
        helm.answer = {"versions": {"crfm-helm": "9"}}
    elif change == "instances":
        settings["max_instances"] = 11
    elif change == "metric":
        settings["metrics"] = {"custom": ["num_instances"]}
    elif change == "entry":
        entries[0] = "custom:path=data.jsonl,shots=1"
    elif change == "tokenizer":
        (tokenizer / "tokenizer.json").write_text('{"version": "2"}')
    job = replace(_job(tmp_path, "b", parts), tokenizer=tokenizer, trust_remote_code=change == "trust")
    found = _evaluator(tmp_path, entries=entries, **settings).evaluate(job)
    assert helm.ran == [["custom", "last"], ["custom", "last"]]
    assert "autoeval resume" not in found.evaluation.versions


def test_helm_runs_within_the_limits_of_its_job(helm: StandIn, tmp_path: Path) -> None:
    job = replace(_job(tmp_path, "a"), limits=Limits(1000.0, grace=1.0, silence=2.0), stopping=lambda: False)
    _evaluator(tmp_path, entries=["one"]).evaluate(job)
    assert helm.limits["stopping"] is job.stopping
    assert 900 < helm.limits["timeout"] <= 1000
    assert (helm.limits["grace"], helm.limits["silence"]) == (1.0, 2.0)
