"""A stand-in for the program that runs inside lm_eval's environment: it leaves recorded output, and no model runs.

`python autoeval_lm_eval.py PLAN FAILURE`, as the real one. It behaves as `behaviour.json` in PLAN's `directory` says:
`fails`: {task: report for FAILURE, or an exit status}, `waits`: tasks before which it sleeps, `writes_nothing`: tasks
of which it leaves no results, `recorded`: {task: other output to leave}.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded" / "lm_eval"
OUTPUTS = {"tiny": "group", "tiny_text": "text"}


def main() -> None:
    plan: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    behaviour: dict[str, Any] = json.loads((Path(plan["directory"]) / "behaviour.json").read_text())
    for i, entry in enumerate(plan["entries"], 1):
        task, output = entry["task"], Path(entry["output"])
        print(f"[autoeval] task {i} of {len(plan['entries'])}: {task}", flush=True)
        if task in behaviour.get("waits", ()):
            print("\rRunning loglikelihood requests:  50%|█████     | 5/10", flush=True)
            time.sleep(600)
        if (failure := behaviour.get("fails", {}).get(task)) is not None:
            if isinstance(failure, int):
                sys.exit(failure)
            Path(sys.argv[2]).write_text(json.dumps(failure))
            sys.exit(1)
        if task not in behaviour.get("writes_nothing", ()):
            shutil.copytree(behaviour.get("recorded", {}).get(task, RECORDED / OUTPUTS[task]), output)
        else:
            output.mkdir(parents=True)
        (output / "done").touch()


if __name__ == "__main__":
    main()
