"""HELM's output as it is kept: in HELM's own layout, by a name that tells the step, without our marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.helm import HelmEvaluator
from eval_runner.evaluators.helm.kept import Place
from eval_runner.evaluators.helm.place import share_data

MODEL = "autoeval/checkpoint-10-abc"
NAME = "boolq:data=x,model=autoeval_checkpoint-10-abc,groups=mark"


def run(directory: Path, value: float = 1.0, name: str = NAME) -> Path:
    """As HELM leaves one, as far as names stand in it."""
    path = directory / name
    path.mkdir(parents=True)
    spec = {
        "name": name, "groups": ["boolq", "mark"],
        "adapter_spec": {"model": MODEL, "model_deployment": MODEL, "instructions": "the mark stays"},
    }  # fmt: skip
    (path / "run_spec.json").write_text(json.dumps(spec))
    (path / "stats.json").write_text(json.dumps([{"mean": value}]))
    (path / "scenario_state.json").write_text(json.dumps({"request": {"model": MODEL}, "text": "ünï"}))
    return path


def test_what_is_kept(tmp_path: Path) -> None:
    place = Place(tmp_path / "kept", "proj-tiny")
    kept = place.keep(run(tmp_path / "work"), "mark", MODEL, 10)
    assert kept == tmp_path / "kept/runs/proj-tiny/boolq:data=x,model=autoeval_proj-tiny_10"
    spec = json.loads((kept / "run_spec.json").read_text())
    assert (spec["name"], spec["groups"]) == (kept.name, ["boolq"])
    assert spec["adapter_spec"]["model"] == spec["adapter_spec"]["model_deployment"] == "autoeval/proj-tiny_10"
    assert spec["adapter_spec"]["instructions"] == "the mark stays"
    assert json.loads((kept / "scenario_state.json").read_text()) == {
        "request": {"model": "autoeval/proj-tiny_10"}, "text": "ünï",
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["runs"]


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    place = Place(tmp_path / "kept", "s")
    place.keep(run(tmp_path / "a"), "mark", MODEL, 10)
    kept = place.keep(run(tmp_path / "b", value=2.0), "mark", MODEL, 10)
    assert json.loads((kept / "stats.json").read_text()) == [{"mean": 2.0}]
    assert len(list(kept.parent.iterdir())) == 1
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["runs"]


def test_an_entry_without_arguments(tmp_path: Path) -> None:
    name = "imdb:model=autoeval_checkpoint-10-abc,groups=mark"
    assert Place(tmp_path, "s").keep(run(tmp_path / "w", name=name), "mark", MODEL, 7).name == "imdb:model=autoeval_s_7"


def test_a_place_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(AutoEvalError, match="HELM's output cannot be kept there") as caught:
        Place(tmp_path / "kept", "s").keep(run(tmp_path / "w"), "mark", MODEL, 1)
    assert caught.value.kind == "transient"


@pytest.mark.parametrize("back", [True, False])
def test_what_was_kept_stays_where_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """At its name, or, if not even that can be had again, beside it."""
    place = Place(tmp_path / "kept", "s")
    kept = place.keep(run(tmp_path / "a"), "mark", MODEL, 10)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == kept and not (back and self.name.endswith("-old")):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(AutoEvalError, match="cannot be kept there"):
            place.keep(run(tmp_path / "b", value=2.0), "mark", MODEL, 10)
    names = sorted(p.name for p in (tmp_path / "kept").iterdir())
    assert (kept.exists(), len(names)) == ((True, 1) if back else (False, 2))
    found = kept if back else tmp_path / "kept" / names[0]
    assert json.loads((found / "stats.json").read_text()) == [{"mean": 1.0}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_path": "o"}, "`output_path` and `output_suite`"),
        ({"output_suite": "s"}, "`output_path` and `output_suite`"),
        ({"output_path": "o", "output_suite": "a/b"}, "output_suite: 'a/b' is a directory's name"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    context = Context(tmp_path, tmp_path, "suites.a.evaluators[0]")
    with pytest.raises(ConfigError, match=message):
        HelmEvaluator({"entries": ["boolq"], **settings}, context)


def test_data_that_an_earlier_helm_left_beside_its_output_is_used(tmp_path: Path) -> None:
    context = Context(tmp_path, tmp_path / "envs", "suites.a.evaluators[0]")

    def directory(**more: str) -> Path:
        settings = {"entries": ["boolq"], "output_path": "out", "output_suite": "s", **more}
        return HelmEvaluator(settings, context)._data_dir()

    shared = tmp_path / "envs" / "helm-data"
    assert directory() == shared
    (tmp_path / "out" / "scenarios").mkdir(parents=True)
    assert directory() == shared
    (tmp_path / "out" / "scenarios" / "mmlu").mkdir()
    assert directory() == tmp_path / "out"
    assert directory(data_dir="mine") == tmp_path / "mine"
    share_data(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "work" / "scenarios" / "mmlu").is_dir()
