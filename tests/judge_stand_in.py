"""A stand-in for a service that speaks OpenAI's API, over HTTP on this host, with faults on order and no model.

    with JudgeStandIn(lambda body: "8, 5") as judge:
        judge.fault("429", times=2, headers={"Retry-After": "0"})       # ask judge.url: three judge.requests

What it says comes from the function that it is given: from the body of a request to the text of the answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Body = dict[str, Any]

ERRORS: dict[str, tuple[int, str | None, str | None, str]] = {
    "400": (400, "invalid_value", None, "this request is not valid"),
    "401": (401, "invalid_api_key", None, "Incorrect API key provided: {key}."),
    "403": (403, None, None, "you may not do this with {key}"),
    "404": (404, "model_not_found", None, "The model `{model}` does not exist"),
    "422": (422, None, None, "this cannot be processed"),
    "429": (429, "rate_limit_exceeded", None, "Rate limit reached for {model}"),
    "500": (500, None, None, "The server had an error"),
    "502": (502, None, None, "bad gateway"),
    "503": (503, None, None, "The engine is currently overloaded"),
    "quota": (429, "insufficient_quota", None, "You exceeded your current quota"),
    "max_tokens": (
        400, "unsupported_parameter", "max_tokens",
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    ),
    "temperature": (400, "unsupported_value", "temperature", "'temperature' does not support 0 with this model."),
    "response_format": (400, None, None, "Invalid parameter: 'response_format' of type 'json_schema' is not supported"),
    "filtered": (400, "content_filter", "prompt", "The response was filtered"),
}  # fmt: skip
"""Kind of fault → status, code, parameter and message of the error object."""
ONLY_WITH = ("max_tokens", "temperature", "response_format")
"""These are refused only where the body has them."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that it is for (None: with all of them). `kind` is a key of
    ERRORS (`text` is shown for the key), or ``timeout`` (silence for `seconds`), ``trickle`` (a blank now and then for
    `seconds`), ``trickle headers`` (a header now and then), ``reset`` (closed without an answer), ``cut`` (closed in
    the middle of the body), ``invalid`` (a body that is no JSON), ``html``, ``no choices``, ``refusal``,
    ``content_filter``, ``null`` (no content), ``parts``, ``wrong model``, ``no usage``, ``error in 200``,
    ``echo key``, ``surrogate`` (half of a pair), ``redirect``
    (`text` is where to)."""

    kind: str
    times: int | None = 1
    when: Callable[[Body], bool] = lambda body: True
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 30.0
    text: str = ""


@dataclass(frozen=True)
class Asked:
    """A request as it came. `content` is its path and body in canonical JSON, by which requests are counted."""

    method: str
    path: str
    body: Body
    headers: dict[str, str]

    @property
    def content(self) -> str:
        return json.dumps([self.path, self.body], sort_keys=True)


class JudgeStandIn:
    """Answers as long as the `with` lasts. `models` is what `/v1/models` lists (None: 404); with a `key`, requests
    without it are refused. `log` is a file that gets the content of every request as a line before it is answered, for
    what has to outlive a client. `tokens` counts a prompt and an answer. `polls` looks until a batch is done.

    `requests` are those for answers, those of batches too; `others` all else. `batch_faults` are used up by the next
    batches: ``failed``, ``expired`` (after half of its requests), ``lost`` (created, and the answer never sent).
    """

    def __init__(
        self,
        reply: Callable[[Body], str] = lambda body: "良い答えです。\n8, 5",
        *,
        models: Sequence[str] | None = ("judge-1",),
        key: str = "",
        log: str | os.PathLike[str] | None = None,
        delay: float = 0.0,
        tokens: Callable[[Body, str], tuple[int, int]] | None = None,
        polls: int = 1,
    ) -> None:
        self.reply = reply
        self.models = models
        self.key = key
        self.log = log
        self.delay = delay
        self.tokens = tokens or count_tokens
        self.polls = polls
        self.requests: list[Asked] = []
        self.others: list[Asked] = []
        self.faults: list[Fault] = []
        self.batch_faults: list[str] = []
        self.lists_batches = True
        self.batches: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.spent: list[tuple[int, int]] = []
        self.most_at_once = 0
        self._now = 0
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.judge = self

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def counts(self) -> Counter[str]:
        """How often each content was asked."""
        with self.lock:
            return Counter(r.content for r in self.requests)

    def fault(self, kind: str, times: int | None = 1, **more: Any) -> Fault:
        """Add a fault; those that were added first come first."""
        fault = Fault(kind, times, **more)
        with self.lock:
            self.faults.append(fault)
        return fault

    def __enter__(self) -> JudgeStandIn:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------ for the handler

    def note(self, asked: Asked, *, answer: bool) -> None:
        with self.lock:
            (self.requests if answer else self.others).append(asked)
            if answer and self.log:
                fd = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    os.write(fd, asked.content.encode() + b"\n")
                finally:
                    os.close(fd)

    def due(self, body: Body) -> Fault | None:
        """The fault of this request, used up by it."""
        with self.lock:
            for fault in self.faults:
                wanted = fault.kind not in ONLY_WITH or fault.kind in body
                if fault.times != 0 and wanted and fault.when(body):
                    fault.times = fault.times if fault.times is None else fault.times - 1
                    return fault
        return None

    def answer(self, path: str, body: Body, fault: Fault | None) -> tuple[int, Any]:
        """Status and body."""
        kind = fault.kind if fault else ""
        if fault and kind in ERRORS:
            return error(kind, body, fault.text or self.key)
        if kind == "error in 200":
            return 200, {"error": {"message": "upstream failed", "code": 502}}
        text = self.reply(body)
        finish: str | None = "stop"
        message: Body = {"role": "assistant", "content": text}
        if kind == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        if kind == "content_filter":
            message["content"], finish = "", "content_filter"
        if kind == "null":
            message["content"], finish = None, "length"
        if kind == "parts":
            message["content"] = [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]
        if kind == "surrogate":
            message["content"] = "half \ud83d"
        if kind == "echo key":
            message["content"] = f"your key is {self.key}"
        choice: Body = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": message} if path.endswith("/chat/completions") else {"text": text}
        used = self.tokens(body, text)
        with self.lock:
            self.spent.append(used)
        model = "another-model" if kind == "wrong model" else body.get("model")
        usage = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
        told = {"id": "x", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
        if kind == "no choices":
            told["choices"] = []
        return 200, told if kind == "no usage" else told | {"usage": usage}

    @contextlib.contextmanager
    def busy(self) -> Any:
        with self.lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self.lock:
                self._now -= 1

    # ------------------------------------------------------------------ batches

    def create_batch(self, body: Body) -> dict[str, Any]:
        name = f"batch_{len(self.batches) + 1}"
        batch = {
            "id": name, "object": "batch", "status": "in_progress", "input_file_id": body["input_file_id"],
            "endpoint": body["endpoint"], "metadata": body.get("metadata"), "errors": None, "output_file_id": None,
            "error_file_id": None, "polls": self.polls, "fault": self.batch_faults.pop(0) if self.batch_faults else "",
        }  # fmt: skip
        self.batches[name] = batch
        return batch

    def look(self, name: str) -> dict[str, Any] | None:
        batch = self.batches.get(name)
        if batch and batch["status"] == "in_progress":
            batch["polls"] -= 1
            if batch["polls"] <= 0:
                self._finish(batch)
        return batch

    def _finish(self, batch: dict[str, Any]) -> None:
        if batch["fault"] == "failed":
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": "x", "message": "Enqueued token limit reached"}]}
            return
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        good, bad = [], []
        for i, line in enumerate(lines):
            if batch["fault"] == "expired" and i >= len(lines) // 2:
                told = {"code": "batch_expired", "message": "This request could not be executed in time."}
                bad.append({"custom_id": line["custom_id"], "response": None, "error": told})
                continue
            self.note(Asked("BATCH", line["url"], line["body"], {}), answer=True)
            status, answer = self.answer(line["url"], line["body"], self.due(line["body"]))
            response = {"status_code": status, "request_id": "r", "body": answer}
            (good if status == 200 else bad).append(
                {"custom_id": line["custom_id"], "response": response, "error": None}
            )
        batch["status"] = "expired" if batch["fault"] == "expired" else "completed"
        for field_, found in (("output_file_id", good), ("error_file_id", bad)):
            if found:
                batch[field_] = f"file-{len(self.files) + 1}"
                self.files[batch[field_]] = "".join(json.dumps(x) + "\n" for x in reversed(found)).encode()


def error(kind: str, body: Body, key: str) -> tuple[int, Any]:
    status, code, parameter, message = ERRORS[kind]
    message = message.format(key=key or "none", model=body.get("model"))
    return status, {"error": {"message": message, "type": "x", "param": parameter, "code": code}}


def count_tokens(body: Body, text: str) -> tuple[int, int]:
    """A token for four bytes, and not more of the answer than were asked for."""
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or 1 << 30
    prompt = json.dumps(body.get("messages") or body.get("prompt"), ensure_ascii=False)
    return len(prompt.encode()) // 4 + 1, min(limit, len(text.encode()) // 4 + 1)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    judge: JudgeStandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed closes its connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        judge = self.server.judge
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if path == "/v1/files":
            self._note("POST", path, {}, answer=False)
            return None if self._refused() else self._upload(data)
        try:
            body = json.loads(data)
        except ValueError:
            return self._send(404, {"error": {"message": f"no such path {path}"}})
        answers = path in ("/v1/chat/completions", "/v1/completions")
        self._note("POST", path, body, answer=answers)
        if self._refused():
            return None
        if path == "/v1/batches":
            with judge.lock:
                batch = judge.create_batch(body)
            return self._cut(b"") if batch["fault"] == "lost" else self._send(200, batch)
        if not answers:
            return self._send(404, {"error": {"message": f"no such path {path}"}})
        with judge.busy():
            time.sleep(judge.delay)
            return self._answer(path, body, judge.due(body))

    def do_GET(self) -> None:
        judge, url = self.server.judge, urlsplit(self.path)
        self._note("GET", url.path, {}, answer=False)
        if self._refused():
            return None
        if url.path == "/v1/models" and judge.models is not None:
            if fault := judge.due({}):
                return self._answer(url.path, {}, fault)
            return self._send(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in judge.models]})
        with judge.lock:
            if url.path == "/v1/batches" and judge.lists_batches:
                names, after = list(judge.batches), parse_qs(url.query).get("after", [""])[0]
                names = names[names.index(after) + 1 :] if after else names
                page = [judge.batches[n] for n in names[:2]]    # few on a page, so that there are pages
                return self._send(200, {"object": "list", "data": page, "has_more": len(names) > 2})
            if (found := re.fullmatch(r"/v1/batches/([^/]+)", url.path)) and (batch := judge.look(found[1])):
                return self._send(200, batch)
            if (found := re.fullmatch(r"/v1/files/([^/]+)/content", url.path)) and found[1] in judge.files:
                return self._send_data(200, judge.files[found[1]], "application/octet-stream")
        return self._send(404, {"error": {"message": "no such thing"}})

    def _answer(self, path: str, body: Body, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        if fault and kind == "timeout":
            time.sleep(fault.seconds)
            return self._cut(b"")
        if kind == "reset":
            return self._cut(b"")
        if kind == "cut":
            text = json.dumps(self.server.judge.answer(path, body, None)[1]).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            return self._cut(head.encode() + text[: len(text) // 2])
        if fault and kind == "trickle":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(int(fault.seconds * 10)):
                self.wfile.write(b"1\r\n \r\n")
                time.sleep(0.1)
            return self._cut(b"")
        if fault and kind == "trickle headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for i in range(int(fault.seconds * 10)):
                self.wfile.write(b"X-%d: x\r\n" % i)
                time.sleep(0.1)
            return self._cut(b"")
        if kind == "invalid":
            return self._send_data(200, b'{"choices": [{"mess', "application/json")
        if kind == "html":
            return self._send_data(200, b"<html>come back later</html>", "text/html")
        if fault and kind == "redirect":
            return self._send(307, {}, {"Location": fault.text})
        return self._send(*self.server.judge.answer(path, body, fault), fault.headers if fault else {})

    def _refused(self) -> bool:
        key = self.server.judge.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self._send(*error("401", {}, self.headers.get("Authorization", "")))
        return True

    def _upload(self, data: bytes) -> None:
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        parts = [p.partition(b"\r\n\r\n") for p in data.split(b"--" + boundary)]
        content = next(body.removesuffix(b"\r\n") for head, _, body in parts if b"filename=" in head)
        judge = self.server.judge
        with judge.lock:
            name = f"file-{len(judge.files) + 1}"
            judge.files[name] = content
        self._send(200, {"id": name, "object": "file", "bytes": len(content), "purpose": "batch"})

    def _note(self, method: str, path: str, body: Body, *, answer: bool) -> None:
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.server.judge.note(Asked(method, path, body, headers), answer=answer)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(body, ensure_ascii="\\ud" in json.dumps(body))
        self._send_data(status, text.encode(), "application/json", headers)

    def _send_data(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _cut(self, data: bytes) -> None:
        """Send this, and close the connection hard."""
        self.wfile.write(data)
        self.wfile.flush()
        if not data:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None: ...
