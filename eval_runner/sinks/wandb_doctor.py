"""What `doctor` looks at for the W&B sink: a key, which is never shown, and whether the service answers."""

from __future__ import annotations

import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autoeval_hooks.findings import Finding
from autoeval_hooks.run_identity import RunIdentity

DEFAULT_URL = "https://api.wandb.ai"
TIMEOUT_S = 4.0
OFFLINE = ("offline", "dryrun", "disabled")


def findings(settings: dict[str, Any], where: str, runs: Iterable[RunIdentity]) -> list[Finding]:
    """`runs` are those whose scores may have to be sent; where all of them are offline, nothing is asked."""
    found = [_package()]
    known = [run for run in runs if run.wandb_id]
    if known and all(run.wandb_mode in OFFLINE for run in known):
        return [*found, Finding("ok", where, "all runs so far are offline: no key and no service are needed")]
    url = (settings.get("base_url") or os.environ.get("WANDB_BASE_URL") or DEFAULT_URL).rstrip("/")
    found.append(_key(settings, where, url))
    others = sorted({run.wandb_base_url.rstrip("/") for run in known} - {url, ""})
    if others:
        found.append(Finding("warning", where, f"runs report to {', '.join(others)}, this runner to {url}",
                             f"set `{where}.base_url` to where the runs report to"))  # fmt: skip
    return [*found, _service(where, url)]


def _package() -> Finding:
    try:
        return Finding("ok", "wandb", f"version {version('wandb')}")
    except PackageNotFoundError:
        return Finding("problem", "wandb", "is not installed here; the runner cannot log late scores",
                       "pip install 'autoeval-hooks[wandb]'")  # fmt: skip


def _key(settings: dict[str, Any], where: str, url: str) -> Finding:
    name = settings.get("api_key_env") or "WANDB_API_KEY"
    if os.environ.get(name):
        return Finding("ok", where, f"a key is in the environment, as {name}")
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        if file.exists() and netrc.netrc(str(file)).authenticators(urlsplit(url).hostname or ""):
            return Finding("ok", where, f"a key is in {file}")
    except (netrc.NetrcParseError, OSError) as error:
        return Finding("warning", where, f"{file}: cannot be read ({type(error).__name__})", "mend it: `wandb login`")
    return Finding("warning", where, f"no key for {url}: neither {name} nor {file} has one; scores that come after "
                   "training cannot be sent", f"export {name}, or `wandb login --host {url}`")  # fmt: skip


def _service(where: str, url: str) -> Finding:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass        # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Finding("warning", where, f"{url} does not answer from here ({reason}); scores wait until it does",
                       "look at the network and proxies of this host (HTTPS_PROXY); evaluation goes on")  # fmt: skip
    return Finding("ok", where, f"{url} answers")
