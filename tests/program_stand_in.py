"""A stand-in for vLLM's and SGLang's servers, neither of which is installed here: their arguments as documented, their
list of models, and no model. `installed` lays packages of their names where Python finds them.

`--stand-in MODE…` says how it misbehaves. It writes what it was started with, so that tests can look it up in the log.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "0.0.stand.in"


def installed(directory: Path) -> Path:
    """A directory for PYTHONPATH, with packages `vllm` and `sglang` whose servers are this stand-in."""
    code = f"import runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n"
    for path in ("vllm/entrypoints/openai/api_server.py", "sglang/launch_server.py"):
        file = directory / path
        file.parent.mkdir(parents=True)
        file.write_text(code)
    for name in ("vllm", "sglang"):
        (directory / name / "__init__.py").touch()
        info = directory / f"{name}-{VERSION}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", "--model-path", required=True)
    parser.add_argument("--tokenizer", "--tokenizer-path", required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tensor-parallel-size", "--tp-size", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--stand-in", nargs="+", default=[])
    args = parser.parse_args()
    names = {"other": ["checkpoint-1-0"], "more": [args.served_model_name, "adapter"], "none": []}
    listed = next((names[mode] for mode in args.stand_in if mode in names), [args.served_model_name])
    env = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "VLLM_API_KEY")}
    print("started", json.dumps({"argv": sys.argv[1:], "env": env}), flush=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            data = json.dumps({"object": "list", "data": [{"id": name} for name in listed]} if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
