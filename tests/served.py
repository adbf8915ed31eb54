"""A stand-in for Megatron's text-generation servers, on loopback: it repeats what real ones answered.

`recorded/served.json` holds the exchanges with Megatron 0.19.2's own static and dynamic server, both on a CPU, for one
model of two layers whose tokenizer stands beside it: each with `api`, `method`, `path`, `body`, `status`, `answer`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"
TOKENIZER = RECORDED / "tokenizer"
EXCHANGES: list[dict[str, Any]] = json.loads((RECORDED / "served.json").read_text(encoding="utf-8"))

Answer = Callable[[str, dict[str, Any]], "tuple[int, object] | None"]
"""Path and body of a request → status and what is answered (text as it is, else JSON); None ends the connection."""


def recorded(path: str, body: dict[str, Any]) -> tuple[int, object]:
    """The answer that the real server gave to the same request."""
    for exchange in EXCHANGES:
        if exchange["path"] == path and exchange["body"] == body:
            return exchange["status"], exchange["answer"]
    return 418, f"not recorded: {path} {json.dumps(body)}"


@dataclass
class Asked:
    """Where the stand-in answers, and the requests that it got."""

    url: str
    requests: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)


@contextmanager
def stand_in(answer: Answer = recorded) -> Iterator[Asked]:
    asked = Asked("")

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.requests.append((self.command, self.path, body))
            found = answer(self.path, body)
            if found is None:
                self.connection.close()
                return
            status, content = found
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST = _do

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    asked.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
