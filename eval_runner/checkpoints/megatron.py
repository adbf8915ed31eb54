"""Checkpoints of Megatron-LM: laid out for its `--load`, or converted by the program that `convert` names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from autoeval_hooks import layouts
from autoeval_hooks import manifest as manifests
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.manifest import FileRecord, Manifest, MegatronRecord
from eval_runner.checkpoints import convert, trust
from eval_runner.checkpoints.base import Request, Servable, Verified, find, look
from eval_runner.checkpoints.huggingface import given_tokenizer

TRACKER = "latest_checkpointed_iteration.txt"
_PATHS = ("tokenizer_model", "vocab_file", "merge_file", "metadata_path", "tokenizer_metadata")
"""Arguments of Megatron's that may name a file or a directory of the training host."""
_HUGGINGFACE, _GPT2 = "HuggingFaceTokenizer", "GPT2BPETokenizer"


@contextmanager
def prepare(request: Request) -> Iterator[Servable]:
    """An adapter (`base.Prepare`). With `convert` in the configuration, it gives what that makes of the checkpoint."""
    m, config = request.ticket.manifest, request.config
    if layouts.iteration(m.path) != m.step or m.step == 0:
        raise CheckpointError(
            f"{m.path}: Megatron finds a checkpoint by its iteration, from 1, and this one's step is {m.step}; submit "
            f"it under the name iter_{m.step:07d}"
        )
    if not config.runner.allow_pickled_weights:
        raise CheckpointError(
            f"{m.path}: Megatron's checkpoints hold pickles, which can run code when loaded; set "
            "`runner.allow_pickled_weights: true` if you trust all who may write there"
        )
    if config.convert is None and any(file.path == layouts.BRIDGE for file in m.files):
        raise ConfigError(
            f"{config.path}: {m.path} is a checkpoint of Megatron-Bridge's ({layouts.BRIDGE}), without the arguments "
            "that Megatron-LM's servers ask a checkpoint for; add `convert: {command: [PROGRAM, ARGUMENT…]}`"
        )
    found = find(request.ticket, config.path_map)
    load = _laid_out(found, m.step, request.work_dir / "load")
    given = _given(request)
    if config.convert is not None:
        tokenizer = partial(_tokenizer, request, given)
        with convert.converted(request, found, load / f"iter_{m.step:07d}", tokenizer) as servable:
            yield servable
        return
    here, seen = _here(m, given, config.path_map)
    directory = given or _for_evaluators(m, here, request.work_dir / "tokenizer")
    model = here.tokenizer.get("tokenizer_model", "")
    for loaded in {directory, Path(model)} if os.path.isdir(model) else {directory}:
        trust.check_code(loaded, allowed=config.runner.trust_remote_code)

    def unchanged() -> None:
        found.unchanged()
        seen.unchanged()

    yield Servable(load, directory, unchanged, megatron=here)


def _laid_out(found: Verified, step: int, directory: Path) -> Path:
    """A directory for `--load`, in which the checkpoint stands under its iteration's name, made of links: the files
    of a pin have no directories, and the trainer's own directory may name another iteration as the latest."""
    target = directory / f"iter_{step:07d}"
    target.mkdir(parents=True)
    for name in found.seen:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).symlink_to(os.path.abspath(layouts.place(str(found.path), name)))
    (directory / TRACKER).write_text(str(step), encoding="utf-8")
    return directory


# ---------------------------------------------------------------------- tokenizers


def _given(request: Request) -> Path | None:
    """The tokenizer that `run.tokenizer` named to the training side, or names here; None where neither does."""
    if request.ticket.manifest.tokenizer:
        return given_tokenizer(request.ticket, request.config.path_map)
    named = request.config.run.tokenizer
    if named and not os.path.isdir(named):
        raise CheckpointError(f"{named}: the tokenizer that `run.tokenizer` names is not here")
    return Path(named) if named else None


def _tokenizer(request: Request, given: Path | None) -> Path:
    """A tokenizer's directory in Hugging Face layout, verified. Raises CheckpointError where there is none."""
    m = request.ticket.manifest
    if given is None:
        here, _ = _here(m, None, request.config.path_map)
        given = _for_evaluators(m, here, request.work_dir / "tokenizer")
    trust.check_code(given, allowed=request.config.runner.trust_remote_code)
    return given


def _here(m: Manifest, given: Path | None, path_map: dict[str, str]) -> tuple[MegatronRecord, Verified]:
    """What the manifest says of the tokenizer, with the paths of this host, and its files, each of which is what
    training read. A Hugging Face tokenizer that is not here is replaced by `given`."""
    record = m.megatron or MegatronRecord()
    named = {name: _local(record, record.tokenizer[name], path_map) for name in _PATHS if record.tokenizer.get(name)}
    needed = {map_path(f.path, path_map): f for f in record.tokenizer_files}
    gone = [path for path in (*needed, *filter(os.path.isabs, named.values())) if not os.path.exists(path)]
    if gone and given is not None and record.tokenizer_type == _HUGGINGFACE:
        named, needed = {"tokenizer_model": str(given)}, {}
    elif gone:
        also = ", or set `run.tokenizer`" if record.tokenizer_type == _HUGGINGFACE else ""
        raise CheckpointError(f"{gone[0]}: the tokenizer that training used is not here; map it with `path_map`{also}")
    seen = {path: _checked(path, file) for path, file in needed.items()}
    here = replace(record, tokenizer={**record.tokenizer, **named})
    return here, Verified(Path(os.sep), seen)


def _local(record: MegatronRecord, value: str, path_map: dict[str, str]) -> str:
    """The value of an argument with its path as this host has it. A relative one is known by the files that were found
    behind it; what names no file, such as a model of the hub, stays."""
    tail = os.path.join(os.sep, os.path.normpath(value.removeprefix("~/")))
    places = [place for f in record.tokenizer_files for place in (f.path, os.path.dirname(f.path))]
    found = [place for place in places if not os.path.isabs(value) and place.endswith(tail)]
    return map_path(found[0] if found else value, path_map)


def _checked(path: str, expected: FileRecord) -> tuple[int, int, int]:
    """What a tokenizer's file looks like, which has the size and the content that training read."""
    before = look(Path(os.sep), path)
    found = manifests.record(*os.path.split(path))
    if (found.size, found.digest) != (expected.size, expected.digest):
        raise CheckpointError(f"{path}: is not the tokenizer that training used, whose content was another; restore it")
    return before


def _for_evaluators(m: Manifest, here: MegatronRecord, directory: Path) -> Path:
    """The tokenizer in Hugging Face layout, in the `directory` if it must be laid out so."""
    model = here.tokenizer.get("tokenizer_model", "")
    files = {"vocab.json": here.tokenizer.get("vocab_file", ""), "merges.txt": here.tokenizer.get("merge_file", "")}
    if here.tokenizer_type == _HUGGINGFACE and os.path.isdir(model):
        return Path(model)
    if here.tokenizer_type == _GPT2 and all(map(os.path.isfile, files.values())):
        directory.mkdir()
        for name, path in files.items():
            (directory / name).symlink_to(path)
        settings = {"tokenizer_class": "GPT2Tokenizer"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return directory
    kind = f"its {here.tokenizer_type}" if here.tokenizer_type else "its tokenizer, which is not known,"
    raise CheckpointError(
        f"{m.path}: evaluators cannot load {kind} as it is; set `run.tokenizer` to a directory with the same one in "
        "Hugging Face layout"
    )
