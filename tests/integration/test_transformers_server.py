"""The real `transformers serve` on a tiny Llama: completions and chat, by the runner and without it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autoeval_hooks import submit
from autoeval_hooks.errors import CheckpointError
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.checkpoints.base import Servable, Verified, look
from eval_runner.evaluators.base import Context, Job, Limits, Outcome
from eval_runner.progress import Progress
from eval_runner.results.schema import Evaluation, Instance, Score
from eval_runner.runner import Runner
from eval_runner.servers import ports
from eval_runner.servers.base import Endpoint, Serving
from eval_runner.servers.programs import TransformersServer
from tests.helm_models import tiny_tokenizer
from tests.processes import MARK, marked, wait_for

pytestmark = pytest.mark.slow

NAME = "checkpoint-5-0123456789abcdef"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOKENS = 8


def tiny_llama(path: Path, seed: int, *, tokenizer: bool = True) -> Path:
    made = tiny_tokenizer(path if tokenizer else path.with_name("tokenizer"))
    made.chat_template = TEMPLATE
    made.save_pretrained(str(path if tokenizer else path.with_name("tokenizer")))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(path))
    return path


def greedy(model: Path, tokenizer: Path, ids: list[int]) -> str:
    """What the model adds, by transformers itself."""
    loaded, words = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(tokenizer)
    out = loaded.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    return str(words.decode(out[0, len(ids) :], skip_special_tokens=True))


def post(endpoint: Endpoint, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=60)
    asked = {"model": endpoint.model, "max_tokens": TOKENS, "temperature": 0, **body}
    connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
    response = connection.getresponse()
    status, answer = response.status, json.loads(response.read())
    connection.close()
    return status, answer


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    mark = uuid.uuid4().hex
    for name, value in {MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    yield mark
    wait_for(lambda: [pid for pid in marked(mark) if pid != os.getpid()] == [])


def server(tmp_path: Path) -> TransformersServer:
    return TransformersServer({"start_timeout": 120}, Context(tmp_path, tmp_path, "server"))


def serving(tmp_path: Path, path: Path, tokenizer: Path, name: str = NAME) -> Serving:
    work = tmp_path / uuid.uuid4().hex
    work.mkdir()
    checkpoint = Servable(path, tokenizer, lambda: None)
    return Serving(checkpoint, name, 5, work, tmp_path / "server.log", lambda: False, Limits(grace=1.0))


def test_it_answers_by_the_checkpoints_name_and_no_other(
    tmp_path: Path, offline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions and chat are those of the model; a server of an older checkpoint on the port is passed over; one that
    is killed is known to be."""
    path = tiny_llama(tmp_path / "checkpoint", 1, tokenizer=False)
    tokenizer = tmp_path / "tokenizer"
    words = AutoTokenizer.from_pretrained(tokenizer)
    older = server(tmp_path).start(serving(tmp_path, tiny_llama(tmp_path / "older", 2), tmp_path / "older", "older-0"))
    taken = int(older.endpoint.url.rpartition(":")[2])
    others, free = iter([taken]), ports.free
    monkeypatch.setattr(ports, "free", lambda count: [next(others, None) or free(1)[0]])
    running = server(tmp_path).start(serving(tmp_path, path, tokenizer))
    endpoint = running.endpoint
    assert endpoint.url != older.endpoint.url
    assert NAME in endpoint.model

    prompt = "def tiny_model(path"
    status, answer = post(endpoint, "/v1/completions", prompt=prompt)
    assert (status, answer["model"]) == (200, endpoint.model)       # what was asked for, letter by letter
    assert answer["choices"][0]["text"] == greedy(path, tokenizer, words(prompt).input_ids)
    _, others_answer = post(older.endpoint, "/v1/completions", prompt=prompt)
    assert answer["choices"][0]["text"] != others_answer["choices"][0]["text"]

    messages = [{"role": "user", "content": "Which model?"}]
    status, answer = post(endpoint, "/v1/chat/completions", messages=messages)
    ids = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert words.decode(ids) == "[user] Which model?\n[assistant] "
    assert (status, answer["model"]) == (200, endpoint.model)
    assert answer["choices"][0]["message"]["content"] == greedy(path, tokenizer, ids)

    stale = replace(endpoint, url=older.endpoint.url)
    assert post(stale, "/v1/completions", prompt=prompt) == (
        400, {"detail": f"Server is pinned to 'older-0@main'; requested '{endpoint.model}'."}
    )  # fmt: skip
    older.close()

    inodes = ports.listening(int(endpoint.url.rpartition(":")[2]))
    (pid,) = [pid for pid in marked(offline) if inodes & ports.owned(pid, inodes) and "serve" in cmdline(pid)]
    os.kill(pid, signal.SIGKILL)
    wait_for(running.failure)
    failure = running.failure()
    assert "`transformers serve` ended in mid-evaluation: killed by signal 9" in str(failure)
    running.close()


def cmdline(pid: int) -> list[str]:
    """Of the server itself, not of what stands above it."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return [] if any("supervisor" in word for word in words) else words


def test_a_checkpoint_that_is_rewritten_while_it_loads(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "checkpoint", 1)
    weights = path / "model.safetensors"
    found = Verified(path, {weights.name: look(path, weights.name)})
    looks: list[int] = []

    def stopping() -> bool:
        if len(looks) == 2:     # its process is there, and has not read them
            weights.write_bytes(weights.read_bytes())
        looks.append(1)
        return False

    one = serving(tmp_path, path, path)
    one = replace(one, checkpoint=replace(one.checkpoint, unchanged=found.unchanged), stopping=stopping)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was evaluated"):
        server(tmp_path).start(one)


# ---------------------------------------------------------------------- under a runner

CONFIG = """
queue: queue
suites: {quick: {evaluators: [{type: helm, entries: [a]}, {type: helm, entries: [b]}]}}
server: {type: transformers, start_timeout: 120}
sinks: []
"""


@dataclass
class Asker:
    """A stand-in for an evaluator: it completes a text, if it `asks`."""

    name: str
    asks: bool
    jobs: list[Job] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def check(self) -> None: ...

    def evaluate(self, job: Job) -> Outcome:
        self.jobs.append(job)
        if self.asks:
            assert job.endpoint is not None
            endpoint = job.endpoint()
            status, answer = post(endpoint, "/v1/completions", prompt="def")
            assert (status, answer["model"]) == (200, endpoint.model)
            assert job.name in endpoint.model
            self.said.append(answer["choices"][0]["text"])
        score = Score(self.name, "em", "test", 1.0, n=1)
        return Outcome(Evaluation("asker", 0.1, (score,)), [Instance(self.name, "em", "test", "0", 1.0)])


@pytest.mark.parametrize("asks", [False, True])
def test_a_ticket_of_hugging_faces(tmp_path: Path, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluators may load the checkpoint or ask the server, which starts when the first asks, and not before."""
    file = tmp_path / "autoeval.yaml"
    file.write_text(CONFIG)
    path = tiny_llama(tmp_path / "out" / "checkpoint-5", 1)
    submit(path, step=5, config=file)
    config = configs.load(str(file))
    built = registry.build_server(config)
    assert isinstance(built, TransformersServer)
    quiet, asking = Asker("quiet", False), Asker("asking", asks)
    with Progress() as progress:
        runner = Runner(config, {"quick": [quiet, asking]}, {}, progress, name="r1", server=built)
        runner.run("drain")
    assert runner.done == 1
    for job in (quiet.jobs[0], asking.jobs[0]):
        assert (job.loadable, job.step, job.max_length, job.facts) == (True, 5, None, {})
        assert job.server_facts["server"] == "transformers"
        assert set(job.server_facts) == {"server", "gpus", "transformers", "torch"}
    logs = list((tmp_path / "queue" / "logs").glob("*.server.log"))
    assert len(logs) == asks
    if asks:
        words = AutoTokenizer.from_pretrained(path)
        assert asking.said == [greedy(path, path, words("def").input_ids)]


