"""The models of ``autoeval.yaml``: what may stand in it, and what the runner is given of it.

Sections that the training side reads too are its dataclasses; they bring pydantic's strictness with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoeval_hooks.config import VERSION, Cadence, HookSection, Range, RunSection


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunnerSection(_Model):
    """`runner`: how tickets are taken and held."""

    order: Literal["newest", "oldest"] = "newest"
    max_attempts: Annotated[int, Range(1)] = 3
    lease: Annotated[float, Range(1)] = 60.0
    """Seconds without a sign of life after which others may take a ticket over."""
    timeout: Annotated[float, Range(0, above=True)] = 86400.0
    """Seconds that one evaluator may take for one checkpoint."""
    breaker: Annotated[int, Range(1)] = 3
    """A suite that failed on so many checkpoints in a row is stopped, and its tickets wait."""
    allow_pickled_weights: bool = False
    """Whether weights that are pickles, which can run code when loaded, are evaluated."""
    trust_remote_code: bool = False
    """Whether a checkpoint's own code (`auto_map`), which loading it runs, is run."""


class ConvertSection(_Model):
    """`convert`: a program that makes a directory in Hugging Face layout of a checkpoint in another."""

    command: Annotated[list[str], Field(min_length=1)]
    """Program and arguments; no shell. `{checkpoint}`, `{output}`, `{tokenizer}`, `{step}` stand for what they name."""
    directory: str | None = None
    """Where converted checkpoints are kept for the tickets to come; None: below the user's cache directory."""
    keep: Annotated[int, Range(1)] = 2
    """So many converted checkpoints are kept, the last ones used."""


class Entry(_Model):
    """An evaluator, a server or a sink: `type` names the plugin, which checks the other keys itself."""

    model_config = ConfigDict(extra="allow")
    type: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class SuiteEntry(Cadence):
    """A suite as it stands in the file: when it is due, and what is evaluated."""

    evaluators: Annotated[list[Entry], Field(min_length=1)]


class File(_Model):
    """The file. Its fields are `autoeval_hooks.config.KEYS`."""

    version: Annotated[int, Range(VERSION, VERSION)] = VERSION
    queue: str
    run: RunSection = RunSection()
    hook: HookSection = HookSection()
    path_map: dict[str, str] = {}
    suites: Annotated[dict[str, SuiteEntry], Field(min_length=1)]
    runner: RunnerSection = RunnerSection()
    server: Entry | None = None
    convert: ConvertSection | None = None
    environments: str | None = None
    sinks: list[Entry] = [Entry(type="wandb")]


@dataclass(frozen=True)
class Suite:
    """A suite to evaluate. `digest` is sha256 (hex) of `text`, the canonical JSON of its definition with the
    variables as they stand in the file and without the cadence; `evaluators` has the variables filled in."""

    name: str
    cadence: Cadence
    digest: str
    text: str
    evaluators: list[dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """What the runner works by. Paths are absolute, and those of the training host are mapped to ours."""

    path: Path
    queue: Path
    run: RunSection
    hook: HookSection
    path_map: dict[str, str]
    suites: dict[str, Suite]
    runner: RunnerSection
    server: dict[str, Any] | None
    """What checkpoints that evaluators cannot load themselves are served with; None where nothing is."""
    convert: ConvertSection | None
    """`directory` is absolute."""
    environments: Path | None
    sinks: list[dict[str, Any]]
    raw_text: str
    """The file's text, with the variables as they stand in it."""
    sinks_text: tuple[str, ...] = ()
    """The canonical JSON of each of `sinks` that stands in the file, with the variables as they stand in it."""
