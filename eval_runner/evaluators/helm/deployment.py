"""The files by which HELM comes to know one checkpoint as a model, in a directory for this checkpoint alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.base import Job

INSIDE = Path(__file__).parent / "inside"
"""Goes on the PYTHONPATH of HELM's processes: our modules there import helm, and nothing of autoeval."""


def model_name(job_name: str) -> str:
    """HELM's name for the checkpoint. It is part of every key of HELM's caches, so it must hold the weights' digest."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,120}", job_name):
        raise ConfigError(f"job name {job_name!r}: HELM takes letters, digits, '.', '_' and '-', 120 at most")
    return f"autoeval/{job_name}"


def write(directory: Path, name: str, job: Job, torch_dtype: str | None) -> None:
    """Write model_deployments.yaml, tokenizer_configs.yaml and model_metadata.yaml for `helm-run --local-path`.

    JSON is YAML, and needs no quoting rules. Every loader is told whether it may run code of the checkpoint's: left
    to itself, transformers asks the terminal. HELM loads the checkpoint where it can; else its server is asked, and
    started here, if it does not run yet; raises what that raises.
    """
    code = {"trust_remote_code": job.trust_remote_code}
    tokenizer = str(job.tokenizer)
    if job.loadable:
        module, what = "autoeval_helm.Checkpoint", {"path": str(job.path), "torch_dtype": torch_dtype} | code
        limit: dict[str, Any] = {"model": str(job.path)}
    else:
        if job.endpoint is None:
            raise ConfigError(f"{job.path}: HELM cannot load it, and no server is configured that answers for it")
        endpoint = job.endpoint()
        module, what = "autoeval_served.Served", {name: getattr(endpoint, name) for name in ("url", "api", "model")}
        limit = {"max_length": job.max_length}
    files: dict[str, Any] = {
        "model_deployments.yaml": {
            "model_deployments": [
                {
                    "name": name,
                    "model_name": name,
                    "tokenizer_name": name,
                    "client_spec": {"class_name": f"{module}Client", "args": what},
                    "window_service_spec": {
                        "class_name": f"{module}Window",
                        "args": {"tokenizer": tokenizer} | limit | code,
                    },
                }
            ]
        },
        "tokenizer_configs.yaml": {
            "tokenizer_configs": [
                {
                    "name": name,
                    "tokenizer_spec": {
                        "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                        "args": {"pretrained_model_name_or_path": tokenizer} | code,
                    },
                }
            ]
        },
        "model_metadata.yaml": {
            "models": [
                {
                    "name": name,
                    "display_name": name,
                    "description": "A checkpoint of a training run.",
                    "creator_organization_name": "autoeval",
                    "access": "closed",
                    "release_date": None,
                    "tags": ["TEXT_MODEL_TAG", "PARTIAL_FUNCTIONALITY_TEXT_MODEL_TAG"],
                }
            ]
        },
    }
    directory.mkdir(parents=True)
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
