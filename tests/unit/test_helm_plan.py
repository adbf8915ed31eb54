"""When a plan is made anew, and what it is made from. `process.run` is a stand-in for HELM's own processes here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import CheckpointError, ConfigError
from eval_runner import environments, process
from eval_runner.evaluators.base import Context, Job
from eval_runner.evaluators.helm import HelmEvaluator
from eval_runner.evaluators.helm.settings import digest

NAN = "Removing stat m because its value is NaN\n"


class StandIn:
    """Answers as HELM's parser, probe and run do; each entry is a run of one instance."""

    def __init__(self) -> None:
        self.probes: list[dict[str, Any]] = []
        self.ran: list[list[str]] = []
        self.answer: dict[str, Any] = {}
        self.nan_in = self.missing_in = ""

    def run(self, argv: list[str], *, log: Path, cwd: Path, **_: object) -> int:
        if argv[1] == "-c":
            (cwd / "hocon.json").write_text(Path(argv[3]).read_text())
        elif argv[1] == "-m":
            self._evaluate(log, cwd)
        else:
            self.probes.append(json.loads(Path(argv[2]).read_text()))
            run = {"metric": "m", "split": "test", "lower_is_better": {}}
            entries = [{"runs": [run]} for _ in self.probes[-1]["entries"]]
            Path(argv[3]).write_text(json.dumps({"versions": {}, "entries": entries} | self.answer))
        return 0

    def _evaluate(self, log: Path, cwd: Path) -> None:
        entries = json.loads((cwd / "runs.conf").read_text())["entries"]
        self.ran.append([entry["description"].split(":")[0] for entry in entries])
        for entry in entries:
            name = f"{entry['description']},groups={entry['groups'][0]}".replace("/", "_")
            spec = name.split(":")[0]
            directory = cwd / "output" / "runs" / "autoeval" / name
            directory.mkdir(parents=True)
            metrics = ["num_instances"] if spec == self.missing_in else ["num_instances", "m"]
            rows = [{"name": {"name": m, "split": "test"}, "count": 1, "sum": 1.0, "mean": 1.0} for m in metrics]
            (directory / "stats.json").write_text(json.dumps(rows))
            (directory / "per_instance_stats.json").write_text("[]")
            with log.open("a") as file:
                file.write(f"Running {name} {{\n" + (NAN if spec == self.nan_in else ""))


@pytest.fixture
def helm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(process, "run", stand_in.run)
    monkeypatch.setattr(environments, "find", lambda *_: tmp_path / "env" / "bin" / "python")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return stand_in


def _evaluator(base: Path, **settings: object) -> HelmEvaluator:
    return HelmEvaluator(settings, Context(base, base / "envs", "suites.quick.evaluators[0]", "autoeval.yaml"))


def _job(base: Path, name: str) -> Job:
    (base / name).mkdir()
    return Job(base, base, name, base / name, base / f"{name}.log")


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
