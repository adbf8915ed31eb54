"""Run lm_eval task by task on one model, as `plan.json` in the working directory says.

    python autoeval_lm_eval.py PLAN FAILURE

This module runs inside the environment of lm_eval, which has no autoeval. It calls lm_eval's Python interface, as
`lm_eval run` would do: that one loads the model for each call, keeps nothing before its last task is done, and ends
with status 0 where it could not write its results. Why a run failed is left in FAILURE, as JSON: the `stage`
(``start``, ``load``: a task and its data, ``model``, ``run``, ``write``), the task, and the exception's classes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Empty(Exception):
    """A task without a document to evaluate."""


class Unusable(Exception):
    """The server's answer does not hold what a log-likelihood needs."""


class Run:
    """What is being done, for the report of a failure."""

    stage = "start"
    task = ""


def main(plan: dict[str, Any]) -> None:
    """Leave `results_*.json`, its samples, and then `done`, in the `output` of each task of the plan."""
    import torch
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.api.registry import get_model  # type: ignore[import-not-found]
    from lm_eval.loggers import EvaluationTracker  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    from torch.utils import collect_env

    os.chdir(plan["directory"])     # where paths that a task names start
    arguments = dict(plan["model_args"])
    device = plan["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if plan["model"] == "hf":
        # On a CPU bfloat16 is slower than float32, and emulated on many; elsewhere as it was trained.
        arguments.setdefault("dtype", "float32" if device == "cpu" else "auto")
    # as the command does: some tasks are made for a tokenizer or a length
    manager = TaskManager(include_path=plan["include_path"], metadata=arguments | plan["metadata"])
    # Each call asks the system for its programs' versions, which takes seconds.
    collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
    Run.stage = "load"
    loaded = []
    for entry in plan["entries"]:
        Run.task = entry["task"]
        try:
            found = manager.load([entry["task"]])
        except IndexError as error:     # lm_eval looks at the first document
            raise Empty(f"{entry['task']}, or a task in it, has no documents to evaluate") from error
        for name, task in found["tasks"].items():
            if len(task.eval_docs) == 0:
                raise Empty(f"task {name} has no documents to evaluate")
        loaded.append(found["groups"][Run.task] if Run.task in found["groups"] else list(found["tasks"].values()))
    Run.stage, Run.task = "model", ""
    _check_answers()
    told = {"batch_size": plan["batch_size"], "max_batch_size": None, "device": device}
    model = get_model(plan["model"]).create_from_arg_obj(arguments, told)
    for i, (entry, what) in enumerate(zip(plan["entries"], loaded, strict=True), 1):
        Run.stage, Run.task = "run", entry["task"]
        print(f"[autoeval] task {i} of {len(loaded)}: {Run.task}", flush=True)
        output = Path(entry["output"])
        tracker = EvaluationTracker(output_path=str(output / "results.json"))   # a directory would get the model's path
        # The seeds are set anew by each call, so that no task's result depends on those before it.
        results = simple_evaluate(
            model=model, model_args=arguments, tasks=what if isinstance(what, list) else [what],
            batch_size=plan["batch_size"], task_manager=manager, evaluation_tracker=tracker, log_samples=True,
            **plan["options"],
        )  # fmt: skip
        Run.stage = "write"
        kept = results.pop("samples")
        results["autoeval"] = {"device": str(getattr(model, "device", ""))}
        tracker.save_results_aggregated(results=results, samples=kept)
        for name in results["configs"]:
            tracker.save_results_samples(task_name=name, samples=kept[name])
        if not list(output.glob("results_*.json")) or len(list(output.glob("samples_*"))) != len(results["configs"]):
            raise OSError(f"{output}: lm_eval could not write its results")     # it logs that, and goes on
        (output / "done").touch()


def _check_answers() -> None:
    """Let a server's answer count only if it has one log-probability for each token that it was sent, and one more.

    lm_eval adds up what is there: of a server that does not echo the prompt, it makes 0.0 for every choice.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # type: ignore[import-not-found]

    plain: Callable[..., Any] = LocalCompletionsAPI.parse_logprobs

    def parse(outputs: Any, tokens: Any = None, ctxlens: Any = None, **options: Any) -> Any:
        answers = outputs if isinstance(outputs, list) else [outputs]
        choices = [c for one in answers for c in sorted(one.get("choices") or [], key=lambda c: c.get("index", 0))]
        if tokens is not None and len(choices) != len(tokens):
            raise Unusable(f"{len(choices)} answers to {len(tokens)} requests")
        for choice, asked in zip(choices, tokens or [], strict=False):
            told = choice.get("logprobs")
            given = told.get("token_logprobs") if isinstance(told, dict) else None
            if not isinstance(given, list) or not isinstance(told.get("top_logprobs"), list):
                raise Unusable("the server gives no log-probabilities of the prompt")
            if len(given) != len(asked) + 1:
                raise Unusable(f"the server gives {len(given)} log-probabilities for {len(asked)} tokens and one more")
        return plain(outputs, tokens=tokens, ctxlens=ctxlens, **options)

    LocalCompletionsAPI.parse_logprobs = staticmethod(parse)


def _failure(error: BaseException) -> dict[str, Any]:
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return {
        "stage": Run.stage, "task": Run.task, "status": status if isinstance(status, int) else None,
        "types": [c.__name__ for e in _chain(error) for c in type(e).__mro__ if c is not object],
        "message": f"{type(error).__name__}: {' '.join(str(error).split())}",
    }  # fmt: skip


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and its causes, the outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Exception as error:
        traceback.print_exc()
        Path(sys.argv[2]).write_text(json.dumps(_failure(error)), encoding="utf-8")
        sys.exit(1)
