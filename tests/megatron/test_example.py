"""examples/megatron/train.sh, with the real parser of Megatron-LM behind the real way in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.conftest import ROOT, SITE

pytestmark = pytest.mark.megatron

TORCHRUN = f"""#!{sys.executable}
# A stand-in for torchrun: one process, here and now.
import os, sys
at = sys.argv.index("-m")
os.execv(sys.executable, [sys.executable, *sys.argv[at:]])
"""
PRETRAIN = """# A stand-in for pretrain_gpt.py, which only reads its arguments.
import json
import shim
shim.install()
from megatron.training.arguments import parse_args
print(json.dumps({name: value for name, value in vars(parse_args()).items() if isinstance(value, (str, int, float))}))
"""


def test_megatron_knows_every_flag(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "pretrain_gpt.py").write_text(PRETRAIN)
    path = os.pathsep.join(map(str, (SITE, ROOT, Path(__file__).parent)))
    done = subprocess.run(
        [ROOT / "examples/megatron/train.sh"], capture_output=True, text=True, timeout=150, check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": path, "RANK": "0",
             "WORLD_SIZE": "1", "MEGATRON": str(tmp_path), "EXAMPLE_OUT": str(tmp_path / "out")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    args = json.loads(done.stdout.splitlines()[-1])
    assert args["autoeval_config"] == "autoeval.yaml"
    assert (args["ckpt_format"], args["tokenizer_type"]) == ("torch_dist", "HuggingFaceTokenizer")
    assert args["global_batch_size"] % args["micro_batch_size"] == 0
    assert args["save"] == str(tmp_path / "out/run")
