"""Where HELM's processes run: their environment variables, and the data that runs share."""

from __future__ import annotations

import os
from pathlib import Path

from eval_runner.evaluators.helm.deployment import INSIDE

PUNKT = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def environment(python: Path, work: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of HELM's processes, and what of it belongs to the results' versions.

    It is ours, secrets included, without what would mix another Python in. The hub is not asked unless
    HF_HUB_OFFLINE=0 is set, and a request that failed is not repeated: the model is on this machine, so a
    second try fails likewise, after HELM has waited for two minutes.

    HELM loads NLTK's sentence splitter for every run. Where it is not installed and the network is not to be
    used, a stand-in under `work` takes its place: it knows no abbreviations, so that scores of generated text
    that has some may differ a little from those with the real one.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    env |= {"PYTHONPATH": str(INSIDE), "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}
    for key, value in (("HF_HUB_OFFLINE", "1"), ("HELM_RETRIES", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        env.setdefault(key, value)
    if env["HF_HUB_OFFLINE"] in ("0", "") or _has_punkt(python, env.get("NLTK_DATA", "")):
        return env, {}
    stand_in = work / "nltk_data"
    english = stand_in / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True, exist_ok=True)
    for name in PUNKT:
        (english / name).touch()
    env["NLTK_DATA"] = os.pathsep.join(filter(None, (env.get("NLTK_DATA"), str(stand_in))))
    return env, {"nltk punkt_tab": "stand-in without abbreviations"}


def has_data(output: Path) -> bool:
    """Whether a HELM that wrote to `output` left data sets there: each in a directory of its own below `scenarios`."""
    scenarios = output / "scenarios"
    return scenarios.is_dir() and any(scenarios.iterdir())


def share_data(output: Path, data_dir: Path) -> None:
    """Let `output`/scenarios, where HELM looks for its data and keeps it, be that of `data_dir`.

    HELM takes a lock for each file that it downloads, so runs may share the directory.
    """
    output.mkdir(parents=True, exist_ok=True)
    scenarios = data_dir / "scenarios"
    scenarios.mkdir(parents=True, exist_ok=True)
    (output / "scenarios").symlink_to(scenarios)


def _has_punkt(python: Path, nltk_data: str) -> bool:
    """Whether NLTK will find the splitter; the places are those of `nltk.data.path`."""
    prefix = python.parent.parent
    places = [Path(p) for p in nltk_data.split(os.pathsep) if p]
    places += [Path.home() / "nltk_data", *(prefix / d / "nltk_data" for d in ("", "share", "lib"))]
    places += [Path(f"/usr/{d}/nltk_data") for d in ("share", "local/share", "lib", "local/lib")]
    tokenizers = [place / "tokenizers" for place in places]
    return any((t / "punkt_tab").exists() or (t / "punkt_tab.zip").exists() for t in tokenizers)
