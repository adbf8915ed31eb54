"""What HELM's client makes of a server's answers, in the environment of HELM, against a stand-in that repeats what
Megatron's servers answered, or answers wrongly."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner import environments
from eval_runner.evaluators.helm import place, reason
from tests import served

pytestmark = pytest.mark.helm

PROMPT = "def tiny(x): return"
START = "<|endoftext|>"
PROMPT_IDS = [69, 380, 395, 9, 89, 10, 27, 391, 387, 83, 79]
ASK = """
import json, sys
import autoeval_served as served
from dataclasses import asdict
from helm.common.request import Request
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

class Tokenizers:
    def __init__(self, wrapped): self.get_wrapped_tokenizer = lambda: wrapped

found = {}
for name, case in json.load(open(sys.argv[1])).items():
    served.ANSWER_S = case["patience"]
    path = case["tokenizer"]
    tokenizer = Tokenizers(HuggingFaceTokenizer.get_tokenizer(path, path))
    client = served.ServedClient(tokenizer, case["url"], case["api"], "autoeval/recorded")
    known = dict(model="autoeval/x", model_deployment="autoeval/x", embedding=False)
    result = client.make_request(Request(**known, **case["request"]))
    found[name] = asdict(result)
json.dump(found, open(sys.argv[2], "w"))
"""
SCORE = {"prompt": START + PROMPT, "echo_prompt": True, "max_tokens": 0, "temperature": 0.0}
GENERATE = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0.0, "stop_sequences": ["\n"]}
SAMPLE = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0.8, "top_p": 0.9}
STOPPED = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.0, "stop_sequences": ["nn"]}
PATHS = {"megatron": "/api", "openai": "/v1/completions"}


def _recorded(api: str, request: dict[str, Any]) -> Any:
    """The recorded answer to the scoring request or to the generation."""
    wanted = 1 if request is SCORE else 6
    for exchange in served.EXCHANGES:
        body = exchange["body"]
        if exchange["path"] == PATHS[api] and wanted in (body.get("tokens_to_generate"), body.get("max_tokens")):
            return copy.deepcopy(exchange["answer"])
    raise AssertionError("not recorded")


def _logprobs(answer: Any) -> list[Any]:
    return answer["logprobs"][0] if "logprobs" in answer else answer["choices"][0]["logprobs"]["token_logprobs"]


def _tokens(answer: Any) -> list[Any]:
    return answer["tokens"][0] if "tokens" in answer else answer["choices"][0]["prompt_token_ids"]


def _with(api: str, change: Callable[[Any], object], request: dict[str, Any] = SCORE) -> Any:
    answer = _recorded(api, request)
    change(answer)
    return 200, answer


def _plain(answer: Any) -> None:
    """As Megatron 0.17 answers: without the tokens' numbers."""
    for key in ("prompt_token_ids", "generation_token_ids", "generation_log_probs"):
        del answer["choices"][0][key]


def _plain_but(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def both(answer: Any) -> None:
        _plain(answer)
        change(answer["choices"][0]["logprobs"])

    return both


def _shift(told: Any) -> None:
    """One token less in front, so that the generated one takes the last place of the prompt."""
    del told["tokens"][0], told["token_logprobs"][1]


S, D = "megatron", "openai"   # the static server and the dynamic one
ERROR = {"message": "Internal Server Error"}
CASES: dict[str, tuple[str, dict[str, Any], Any, str | None]] = {
    # name: api, request, what is answered (None: what was recorded), how the error goes on (None: none)
    "score-m": (S, SCORE, None, None),
    "score-o": (D, SCORE, None, None),
    "score-plain": (D, SCORE, _with(D, _plain), None),
    "generate-m": (S, GENERATE, None, None),
    "generate-o": (D, GENERATE, None, None),
    "generate-plain": (D, GENERATE, _with(D, _plain, GENERATE), None),
    "sample-m": (S, SAMPLE, None, None),
    "sample-o": (D, SAMPLE, None, None),
    "stopped-m": (S, STOPPED, None, None),
    "stopped-o": (D, STOPPED, None, None),
    # What Megatron 0.17 to 0.19 leave of an answer that a stop sequence of two tokens ended: made up, by their source.
    "stopped-late": (D, STOPPED, (200, {"choices": [
        {"text": "de", "finish_reason": "stop", "generation_token_ids": PROMPT_IDS[:2],
         "logprobs": {"tokens": ["d", "ef"], "token_logprobs": [None, -1.0, -2.0, -8.0, -9.0]}}]}), None),
    "none-generated": (D, GENERATE, (200, {"choices": [
        {"text": "d", "generation_token_ids": PROMPT_IDS[:1],
         "logprobs": {"tokens": ["d"], "token_logprobs": [None, None]}}]}), "gives None for a log-probability"),
    "two": (S, GENERATE | {"num_completions": 2}, None, None),
    "nothing-m": (S, GENERATE, (200, {"tokens": [PROMPT_IDS], "logprobs": [[-1.0] * 10]}), None),
    "nothing-o": (D, GENERATE, (200, {"choices": [{"text": "", "generation_token_ids": [], "logprobs": {
        "tokens": [], "token_logprobs": [None]}}]}), None),
    "no-start": (S, SCORE, (200, {"tokens": [[*PROMPT_IDS, 79]], "logprobs": [[-1.0] * 11]}),
                 f"{reason.UNUSABLE}: URL/api answers for another prompt: token 0 of 12 is 69, not 0; .* dynamic one"),
    "other-ids": (D, SCORE, _with(D, lambda a: _tokens(a).__setitem__(3, 7)),
                  f"{reason.UNUSABLE}: .* answers for another prompt: token 3 of 12 is 7, not 395"),
    "fewer-ids": (D, SCORE, _with(D, lambda a: _tokens(a).pop()), "answers for another prompt: token 11 .* nothing, n"),
    "other-text": (D, SCORE, _with(D, _plain_but(lambda t: t["tokens"].__setitem__(2, "g"))),
                   "answers for another prompt: token 2 of 12 is 'g', not 'ef'"),
    "shifted-text": (D, SCORE, _with(D, _plain_but(_shift)), "answers for another prompt: token 0 of 12 is 'd', not"),
    "short-text": (D, SCORE, _with(D, _plain_but(lambda t: (t["tokens"].clear(), t["token_logprobs"].clear()))),
                   "answers for another prompt: 0 tokens for a prompt of 12"),
    "fewer-logprobs-m": (S, SCORE, _with(S, lambda a: _logprobs(a).pop()),
                         f"{reason.UNUSABLE}: .* gives 11 log-probabilities for 13 tokens"),
    "fewer-logprobs-o": (D, SCORE, _with(D, lambda a: _logprobs(a).pop()), "gives 12 log-probabilities for 13 tokens"),
    "no-logprobs": (D, SCORE, _with(D, lambda a: a["choices"][0].update(logprobs=None)), "gives no log-probabilities"),
    "too-many-m": (S, SCORE, (200, {"tokens": [[0, *PROMPT_IDS, 1, 1]], "logprobs": [[-1.0] * 13]}),
                   "adds 2 tokens where 1 were asked for"),
    "too-many-o": (D, SCORE, _with(D, lambda a: a["choices"][0].update(generation_token_ids=[1, 1])),
                   "13 tokens for a prompt of 12 and 1 more"),
    "none-m": (S, SCORE, _with(S, lambda a: _logprobs(a).__setitem__(4, None)), "gives None for a log-probability"),
    "nan-m": (S, SCORE, _with(S, lambda a: _logprobs(a).__setitem__(4, float("nan"))),
              f"{reason.BROKEN}: .* gives nan"),
    "inf-o": (D, SCORE, _with(D, lambda a: _logprobs(a).__setitem__(4, float("-inf"))),
              f"{reason.BROKEN}: .* gives -inf"),
    "no-choice": (D, SCORE, (200, {"choices": []}), f"{reason.UNUSABLE}: .* has no list of one `choices`"),
    "refused-m": (S, SCORE, (200, '"top_k must be an integer"'), f"{reason.UNUSABLE}: URL/api says: top_k must be an"),
    "refused-o": (D, SCORE, (400, "Invalid sampling"), f"{reason.UNUSABLE}: .* answers 400: Invalid sampling"),
    "html": (S, SCORE, (200, "<html> hello"), f"{reason.UNUSABLE}: .* says: <html> hello"),
    "other-server": (S, SCORE, (404, "Not Found"), f"{reason.UNUSABLE}: .* answers 404: Not Found"),
    "broken-m": (S, SCORE, (500, ERROR), f"{reason.CANNOT_ASK}: .* answers 500: .*Internal Server Error"),
    "busy-o": (D, SCORE, (503, ""), f"{reason.CANNOT_ASK}: .* answers 503: nothing"),
    "many-o": (D, SCORE, (429, "later"), f"{reason.CANNOT_ASK}: .* answers 429: later"),
    "died": (D, SCORE, "died", f"{reason.CANNOT_ASK}: URL/v1/completions: RemoteDisconnected: "),
    "silent": (S, SCORE, "silent", f"{reason.CANNOT_ASK}: URL/api: TimeoutError: "),
    "chat": (D, {"messages": [{"role": "user", "content": "x"}]}, None, f"{reason.UNUSABLE}: HELM asks with chat mess"),
    "adds-start": (S, SCORE | {"prompt": PROMPT}, (200, {"tokens": [[*PROMPT_IDS, 79]], "logprobs": [[-1.0] * 11]}),
                   None),
}  # fmt: skip


@dataclass
class Asked:
    result: Any
    sent: list[dict[str, Any]]
    url: str


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """Every case, asked by one process of HELM's environment: each has a path of its own at the stand-in."""
    try:
        python = environments.find(os.environ.get("AUTOEVAL_TEST_HELM_ENV"), "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    from tests.helm_models import tiny_tokenizer

    work = tmp_path_factory.mktemp("served")
    adds = work / "adds-start"
    tiny_tokenizer(adds, adds_start=True)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, object] | None:
        _, name, rest = path.split("/", 2)
        given = CASES[name][2]
        if given in ("died", "silent"):
            time.sleep(1.0 if given == "silent" else 0)
            return None
        if name == "adds-start":
            ids = given[1]["tokens"]
            ids[0] = [*json.loads((work / "ids.json").read_text()), 79]
            return 200, {"tokens": ids, "logprobs": [[-1.0] * (len(ids[0]) - 1)]}
        return given or served.recorded(f"/{rest}", body)

    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(adds)
    (work / "ids.json").write_text(json.dumps(plain(PROMPT, add_special_tokens=False).input_ids))
    with served.stand_in(answer) as server:
        cases = {
            name: {
                "api": api, "request": request, "url": f"{server.url}/{name}",
                "patience": 0.3 if given == "silent" else 60.0,
                "tokenizer": str(adds if name == "adds-start" else served.TOKENIZER),
            }
            for name, (api, request, given, _) in CASES.items()
        }  # fmt: skip
        (work / "cases.json").write_text(json.dumps(cases))
        environ = place.environment(python, work)[0] | {"http_proxy": "http://127.0.0.1:9"}
        argv = [python, "-c", ASK, work / "cases.json", work / "found.json"]
        subprocess.run(argv, env=environ, cwd=work, check=True, timeout=200)
        found = json.loads((work / "found.json").read_text())
        sent = {name: [b for _, path, b in server.requests if path.split("/")[1] == name] for name in CASES}
        return {name: Asked(found[name], sent[name], f"{server.url}/{name}") for name in CASES}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_an_answer_that_cannot_be_used_is_told(asked: dict[str, Asked], name: str) -> None:
    one, said = asked[name], CASES[name][3] or ""
    assert one.result["success"] is False
    assert one.result["completions"] == []
    assert one.result["error_flags"] == {"is_retriable": False, "is_fatal": True}
    assert re.search(said.replace("URL", re.escape(one.url)), one.result["error"]), one.result["error"]
    assert one.result["error"].startswith(reason.OURS)


@pytest.mark.parametrize("name", ["score-m", "score-o", "score-plain"])
def test_the_tokens_of_a_prompt_have_their_log_probabilities(asked: dict[str, Asked], name: str) -> None:
    (completion,) = _completions(asked[name])
    texts = [t["text"] for t in completion["tokens"]]
    assert texts == [START, "d", "ef", " tiny", "(", "x", ")", ":", " re", "tu", "r", "n"]
    told = _logprobs(_recorded(S, SCORE))[:11]
    assert [t["logprob"] for t in completion["tokens"]] == pytest.approx([0.0, *told], abs=1e-5)
    assert completion["logprob"] == pytest.approx(sum(told), abs=1e-4)
    assert completion["text"] == START + PROMPT


def test_both_servers_are_asked_for_one_token_where_none_is_wanted(asked: dict[str, Asked]) -> None:
    assert asked["score-m"].sent == [
        {"prompts": [START + PROMPT], "tokens_to_generate": 1, "logprobs": True, "top_k": 1}
    ]
    (sent,) = asked["score-o"].sent
    assert (sent["prompt"], sent["max_tokens"], sent["echo"]) == ([0, *PROMPT_IDS], 1, True)


@pytest.mark.parametrize("name", ["generate-m", "generate-o", "generate-plain"])
def test_temperature_zero_is_greedy_and_the_prompt_is_not_repeated(asked: dict[str, Asked], name: str) -> None:
    (completion,) = _completions(asked[name])
    assert completion["text"] == "nnnnnn"
    assert [t["text"] for t in completion["tokens"]] == ["n"] * 6
    assert all(t["logprob"] < -1 for t in completion["tokens"])
    (sent,) = asked[name].sent
    assert sent.get("top_k") == (1 if name == "generate-m" else None)
    assert sent.get("temperature") == (None if name == "generate-m" else 0.0)


def test_sampling_is_passed_on(asked: dict[str, Asked]) -> None:
    for name in ("sample-m", "sample-o"):
        (sent,) = asked[name].sent
        assert (sent["temperature"], sent["top_p"], sent.get("top_k")) == (0.8, 0.9, None)
        assert len(_completions(asked[name])[0]["tokens"]) == 4
    assert len(_completions(asked["two"])) == len(asked["two"].sent) == 2


def test_what_stands_before_a_stop_sequence_keeps_its_own_numbers(asked: dict[str, Asked]) -> None:
    (completion,) = _completions(asked["stopped-late"])
    assert [(t["text"], t["logprob"]) for t in completion["tokens"]] == [("d", -1.0), ("ef", -2.0)]


@pytest.mark.parametrize("name", ["stopped-m", "stopped-o"])
def test_a_stop_sequence_is_cut_off(asked: dict[str, Asked], name: str) -> None:
    assert _completions(asked[name])[0]["text"] == ""
    assert asked[name].sent[0].get("stop") == (["nn"] if name == "stopped-o" else None)


def test_a_model_may_have_nothing_to_say(asked: dict[str, Asked]) -> None:
    for name in ("nothing-m", "nothing-o"):
        assert _completions(asked[name]) == [
            {"text": "", "logprob": 0, "tokens": [], "finish_reason": None, "multimodal_content": None,
             "thinking": None}
        ]  # fmt: skip


def test_a_server_may_leave_out_the_start_token_that_the_tokenizer_adds(asked: dict[str, Asked]) -> None:
    (completion,) = _completions(asked["adds-start"])
    assert "".join(t["text"] for t in completion["tokens"]) == PROMPT
    assert completion["tokens"][0]["logprob"] == 0.0


def _completions(one: Asked) -> list[Any]:
    assert one.result["success"] is True, one.result["error"]
    assert one.result["cached"] is False
    found: list[Any] = one.result["completions"]
    return found
