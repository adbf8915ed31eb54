"""A stand-in for Megatron-LM's text-generation servers: their arguments and their HTTP interface, and no model.

`--stand-in MODE…` says how it misbehaves. It writes what it was started with, so that tests can look it up in the log.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    modes: frozenset[str] = frozenset()

    def do_PUT(self) -> None:
        if "hangs" in self.modes:
            time.sleep(600)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "refuses" in self.modes:
            print("ValueError: no such tokenizer", flush=True)
            return self.answer(500, {"message": "Internal Server Error"})
        if "text" in self.modes:
            return self.answer(200, "prompts argument required")
        return self.answer(200, {"text": [prompt + "!" for prompt in asked["prompts"]]})

    def do_GET(self) -> None:
        if self.path == "/exit":
            print("RuntimeError: the engine is gone", flush=True)
            os._exit(3)
        if self.path == "/kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.path == "/closes":
            self.server.socket.close()      # and goes on, as a process does whose worker died
            return
        self.answer(200 if self.path == "/v1/health" else 404, {"ready": True})

    def answer(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--load", required=True)
    parser.add_argument("--stand-in", nargs="+", default=[])
    parser.add_argument("--say", default="")
    parser.add_argument("--host", default="127.0.0.1")
    args, _ = parser.parse_known_args()
    Handler.modes = modes = frozenset(args.stand_in)
    rank = int(os.environ.get("RANK", "0"))
    print("started", json.dumps({"rank": rank, "pid": os.getpid(), "argv": sys.argv[1:]}), args.say, flush=True)
    subprocess.Popen(["sleep", "600"], start_new_session=True)      # a grandchild in a session of its own
    if rank:
        time.sleep(600)
    if "fails" in modes:
        raise RuntimeError("size mismatch for embedding")
    if "killed" in modes:
        os.kill(os.getpid(), signal.SIGKILL)
    if "deaf" in modes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if {"never", "deaf"} & modes:
        time.sleep(600)
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    time.sleep(600)


if __name__ == "__main__":
    main()
