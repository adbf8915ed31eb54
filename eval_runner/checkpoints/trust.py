"""What loading a Hugging Face checkpoint would run: code of its own, and weights that are pickles.

Both are refused unless the configuration allows them. What a checkpoint loads is said by its own files, so these
are read too: an index or a configuration may name any file as weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.manifest import Manifest

MAX_BYTES = 64 << 20
_SETTINGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""Files in which transformers looks for `auto_map`, which names classes to import."""
_GENERATE = "custom_generate/generate.py"
"""Code that transformers puts in the place of `generate`."""


def check_code(path: Path, *, allowed: bool) -> None:
    """Raise CheckpointError where the checkpoint or tokenizer at `path` names code of its own, unless it is allowed."""
    if allowed:
        return
    named = [name for name in _SETTINGS if _read(path / name).get("auto_map")]
    if (path / _GENERATE).exists():
        named.append(_GENERATE)
    if named:
        raise CheckpointError(
            f"{path / named[0]}: names code of the checkpoint's own (auto_map), which loading it would run; set "
            "`runner.trust_remote_code: true` if you trust it, or remove auto_map where transformers knows the model"
        )


def check_weights(path: Path, manifest: Manifest, *, pickles: bool) -> None:
    """Raise CheckpointError for weights that are pickles, unless `pickles`, and for any that the manifest lacks."""
    names = {f.path for f in manifest.files}
    named = set(manifest.pickled)
    for index in (name for name in names if name.endswith(".index.json")):
        shards = _read(path / index).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            named.add(_known(path / index, shard, names))
    if chosen := _read(path / "config.json").get("transformers_weights"):
        named.add(_known(path / "config.json", chosen, names))
    doubtful = sorted(n for n in named if not n.endswith((".safetensors", ".safetensors.index.json")))
    if doubtful and not pickles:
        raise CheckpointError(
            f"{path / doubtful[0]}: pickled weights can run code when loaded; save safetensors, "
            "or set `runner.allow_pickled_weights: true`"
        )


def _known(file: Path, name: object, names: set[str]) -> str:
    if not isinstance(name, str) or name not in names:
        raise CheckpointError(f"{file}: names {name!r:.200} as weights, which the manifest lacks; save it again")
    return name


def _read(file: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds; an empty one where there is no file, or something else in it."""
    try:
        with file.open("rb") as opened:
            data = json.loads(opened.read(MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); save the checkpoint again") from error
    return data if isinstance(data, dict) else {}
