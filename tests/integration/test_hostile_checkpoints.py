"""Checkpoints that bring code, as auto_map, as a pickle, as a tokenizer: each would leave a canary if it ran."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.errors import ConfigError
from eval_runner import config as configs
from eval_runner import environments, registry
from eval_runner.evaluators.base import Job
from eval_runner.evaluators.helm import deployment
from eval_runner.evaluators.helm.deployment import INSIDE
from eval_runner.evaluators.helm.place import environment
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]

MODEL = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({canary!r}).touch()

class CanaryConfig(GPT2Config):
    model_type = "canary"

class CanaryModel(GPT2LMHeadModel):
    config_class = CanaryConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({canary!r}).touch()

class CanaryTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Opens:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_code(path: Path, canary: Path) -> Path:
    """A tiny model that only its own code can load."""
    from tests.helm_models import tiny_model

    tiny_model(path, 1)
    (path / "modeling_x.py").write_text(MODEL.format(canary=str(canary)))
    edit(path / "config.json", model_type="canary", architectures=["CanaryModel"],
         auto_map={"AutoConfig": "modeling_x.CanaryConfig",
                   "AutoModelForCausalLM": "modeling_x.CanaryModel"})  # fmt: skip
    return path


def with_tokenizer_code(path: Path, canary: Path) -> Path:
    from tests.helm_models import tiny_model

    tiny_model(path, 1)
    (path / "tokenization_x.py").write_text(TOKENIZER.format(canary=str(canary)))
    edit(path / "tokenizer_config.json", tokenizer_class="CanaryTokenizer",
         auto_map={"AutoTokenizer": [None, "tokenization_x.CanaryTokenizer"]})  # fmt: skip
    return path


def pickled(path: Path, canary: Path, name: str = "pytorch_model.bin") -> Path:
    """A tiny model whose weights are a pickle that creates a file."""
    from tests.helm_models import tiny_model

    tiny_model(path, 1)
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps({"transformer.wte.weight": Opens(canary)}))
    return path


def behind_an_index(path: Path, canary: Path) -> Path:
    """The same, but what looks for weights sees only a harmless file: the index names the other."""
    pickled(path, canary, "spiece.model")
    (path / "model-00001-of-00001.safetensors").write_bytes(b"")
    index = {"metadata": {"total_size": 1}, "weight_map": {"transformer.wte.weight": "spiece.model"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def outside_by_an_index(path: Path, canary: Path) -> Path:
    behind_an_index(path, canary)
    (path / "spiece.model").rename(path.parent / "evil.bin")
    index = path / "model.safetensors.index.json"
    edit(index, weight_map={"transformer.wte.weight": "../evil.bin"})
    return path


def chosen_by_the_configuration(path: Path, canary: Path) -> Path:
    pickled(path, canary, "spiece.model")
    (path / "model.safetensors").write_bytes(b"")
    edit(path / "config.json", transformers_weights="spiece.model")
    return path


def generates_by_itself(path: Path, canary: Path) -> Path:
    from tests.helm_models import tiny_model

    tiny_model(path, 1)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(f"open({str(canary)!r}, 'w')\ndef generate(): ...\n")
    return path


CODE, PICKLES = "runner.trust_remote_code: true", "runner.allow_pickled_weights: true"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (with_code, CODE), (with_tokenizer_code, CODE), (generates_by_itself, CODE), (pickled, PICKLES),
        (behind_an_index, PICKLES), (chosen_by_the_configuration, PICKLES), (outside_by_an_index, "the manifest lacks"),
    ],
)  # fmt: skip
def test_it_is_refused_before_anything_is_loaded(
    tmp_path: Path, config_file: Path, run: Run, make: Callable[[Path, Path], Path], says: str
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    submit(make(tmp_path / "out" / "checkpoint-1", tmp_path / "canary"), step=1, config=config_file)
    evaluator = StandIn()
    run(evaluator)
    (failed,) = store.collect(tmp_path / "queue").failed
    assert says in failed.failure.message
    assert failed.failure.kind == "checkpoint"
    assert "\n" not in failed.failure.message
    assert evaluator.jobs == []
    assert not (tmp_path / "canary").exists()


def test_a_tokenizers_directory_of_its_own_is_looked_at_too(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    with_tokenizer_code(tmp_path / "tokenizer", tmp_path / "canary")
    config_file.write_text(config_file.read_text() + f"run: {{tokenizer: {tmp_path}/tokenizer}}\n")
    submit(checkpoint(100, tokenizer=False), step=100, config=config_file)
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert CODE in failed.failure.message
    assert "tokenizer/tokenizer_config.json" in failed.failure.message


def test_leave_reaches_the_evaluator(tmp_path: Path, config_file: Path, run: Run) -> None:
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 6.0, trust_remote_code: true"))
    submit(with_code(tmp_path / "out" / "checkpoint-1", tmp_path / "canary"), step=1, config=config_file)
    evaluator = StandIn()
    run(evaluator)
    assert [job.trust_remote_code for job in evaluator.jobs] == [True]


@pytest.mark.parametrize("trusted", [False, True])
def test_every_loader_of_helm_is_told(tmp_path: Path, trusted: bool) -> None:
    job = Job(tmp_path, tmp_path, "x", tmp_path, tmp_path / "log", trust_remote_code=trusted)
    deployment.write(tmp_path / "m", "autoeval/x", job, None)
    text = "".join(p.read_text() for p in (tmp_path / "m").iterdir())
    assert text.count(f'"trust_remote_code": {json.dumps(trusted)}') == 3


# ---------------------------------------------------------------------- the real HELM

LOAD = """
import json, sys
from pathlib import Path
import autoeval_helm
from helm.common.cache import BlackHoleCacheConfig
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
out = {}
for name, path, trusted in json.loads(sys.argv[1]):
    code = {} if trusted is None else {"trust_remote_code": trusted}
    try:
        tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), name, path, **code)
        autoeval_helm.CheckpointClient(BlackHoleCacheConfig(), tokenizer, name, path, **code)
        autoeval_helm._limits(name, path, path, bool(trusted))
        out[name] = ""
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"
    out[name + " ran"] = Path(path).with_suffix(".canary").exists()
Path(sys.argv[2]).write_text(json.dumps(out))
"""


@pytest.fixture(scope="module")
def helm_python() -> Path:
    try:
        return environments.find(os.environ.get("AUTOEVAL_TEST_HELM_ENV"), "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.helm
@pytest.mark.slow
def test_the_client_inside_helm_runs_nothing_by_itself(tmp_path: Path, helm_python: Path) -> None:
    """Without the guard before it: HELM's own process, given such checkpoints."""
    makers = {"code": with_code, "tokenizer": with_tokenizer_code, "pickle": pickled, "index": behind_an_index,
              "generate": generates_by_itself}  # fmt: skip
    cases = [(n, str(make(tmp_path / n, tmp_path / f"{n}.canary")), False) for n, make in makers.items()]
    # That the canaries sing at all is shown by leave being given.
    for name in ("code", "tokenizer"):
        allowed = f"{name}-allowed"
        cases.append((allowed, str(makers[name](tmp_path / allowed, tmp_path / f"{allowed}.canary")), True))
    answer = tmp_path / "answer.json"
    done = subprocess.run(
        [helm_python, "-c", LOAD, json.dumps(cases), answer], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=environment(helm_python, tmp_path)[0] | {"HF_HOME": str(tmp_path / "hf")}, timeout=280, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(answer.read_text())
    assert [name for name in makers if out[f"{name} ran"]] == []
    for name in ("code", "pickle", "index"):      # the others load without their code
        assert out[name].startswith("CannotLoad: autoeval cannot load the checkpoint"), (name, out[name])
    assert INSIDE.is_dir()
    for name in ("code-allowed", "tokenizer-allowed"):
        assert out[name] == ""
        assert out[f"{name} ran"]


@pytest.mark.helm
@pytest.mark.slow
def test_code_runs_where_the_configuration_allows_it(tmp_path: Path, helm_python: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three " * 20)
    config = tmp_path / "autoeval.yaml"
    given = os.environ.get("AUTOEVAL_TEST_HELM_ENV")
    env = f", env: {given}" if given else ""
    config.write_text(
        "queue: queue\nrunner: {trust_remote_code: true}\nsinks: []\nsuites: {quick: {evaluators: [{type: helm, "
        f"entries: ['autoeval_bpb:path=text.txt'], data_dir: data{env}}}]}}}}\n"
    )
    submit(with_code(tmp_path / "out" / "checkpoint-1", tmp_path / "canary"), step=1, config=config)
    loaded = configs.load(config)
    with Progress() as progress:
        Runner(loaded, {"quick": registry.build_evaluators(loaded, loaded.suites["quick"])}, {}, progress).run("once")
    contents = store.collect(tmp_path / "queue")
    assert contents.failed == ()
    assert contents.results[0].scores[0].metric == "bits_per_byte"
    assert (tmp_path / "canary").exists()
