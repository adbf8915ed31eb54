"""A stand-in for a converter: it leaves a directory in Hugging Face layout whose weights name what they were made of.

    python converters.py CHECKPOINT OUTPUT [HOW…]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(checkpoint: Path, output: Path, *how: str) -> int:
    print(f"converting {checkpoint.name}", flush=True)
    calls = os.environ.get("CALLS")
    if calls:
        with Path(calls).open("a") as file:
            file.write("call\n")
    while "slow" in how and not Path(f"{calls}.go").exists():
        time.sleep(0.02)
    if "fails" in how:
        print("no such architecture", file=sys.stderr)
        return 3
    if "nothing" in how:
        return 0
    output.mkdir()
    files = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    (output / "model.safetensors").write_text(f"{files} {how}")
    (output / "config.json").write_text('{"model_type": "llama"}')
    if "bare" not in how:
        (output / "tokenizer.json").write_text("{}")
    if "code" in how:
        (output / "config.json").write_text('{"auto_map": {"AutoModel": "x.X"}}')
    if "pickle" in how:
        (output / "model.safetensors").rename(output / "pytorch_model.bin")
    if "no-weights" in how:
        (output / "model.safetensors").unlink()
    if "link" in how:
        (output / "config.json").unlink()
        (output / "config.json").symlink_to(checkpoint / "metadata.json")
    if "rewrites" in how:
        shard = (checkpoint / "__0_0.distcp").resolve()
        shard.write_bytes(shard.read_bytes() + b"more")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
