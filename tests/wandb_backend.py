"""A stand-in for the W&B service on 127.0.0.1, for tests with the real client (0.31). Standard library only.

It speaks what the client needs to create a run, log, resume, sync offline directories and read the history back
through `wandb.Api`. Rows are kept as the service keeps them: each request names the offset of its first row, and a
writer that names an offset which is taken overwrites what stands there (`Run.overwritten` counts that). So a test
can see a training row being clobbered. It is not the service: no permissions, no artifacts, no media.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

API_KEY = "0123456789" * 4
ENTITY = "tester"


@dataclass
class Run:
    """One run as the service holds it. `rows` maps an offset to a row; `files` is what was uploaded."""

    entity: str
    project: str
    name: str
    number: int
    display_name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    came: dict[int, float] = field(default_factory=dict)
    overwritten: int = 0
    state: str = "running"
    states: list[str] = field(default_factory=list)
    events: int = 0
    files: dict[str, bytes] = field(default_factory=dict)

    def history(self) -> list[dict[str, Any]]:
        """All rows in the order of their offsets."""
        return [self.rows[offset] for offset in sorted(self.rows)]

    def shown(self, late: float) -> list[dict[str, Any]]:
        """The history, less what came within the last `late` seconds."""
        until = time.monotonic() - late
        return [self.rows[offset] for offset in sorted(self.rows) if self.came.get(offset, 0.0) <= until]

    def put(self, offset: int, lines: list[str]) -> None:
        for i, line in enumerate(lines):
            row = json.loads(line)
            if self.rows.get(offset + i, row) != row:
                self.overwritten += 1
            self.rows[offset + i] = row
            self.came.setdefault(offset + i, time.monotonic())

    def set_state(self, state: str) -> None:
        self.state = state
        self.states.append(state)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed resets its connection: no news."""


class Backend:
    """The stand-in service; use `backend()`. `runs` maps "entity/project/id" to a Run.

    While `hang` is clear, requests are not answered until it is set again. While `loses_rows` is true, rows are
    acknowledged and dropped. Who reads the history sees a row only `late` seconds after it came. While `refuses` is a
    status, such as 500, every request gets that. Between `go_away` and `come_back` nobody listens. `asked` counts
    requests.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.operations: list[str] = []
        self.loses_rows = False
        self.late = 0.0
        self.hang = threading.Event()
        self.hang.set()
        self.refuses = 0
        self.asked = 0
        self.lock = threading.RLock()
        self.port = 0
        self.come_back()
        self.url = f"http://127.0.0.1:{self.port}"

    def come_back(self) -> None:
        self.server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def go_away(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def run(self, project: str, name: str, entity: str = ENTITY) -> Run:
        return self.runs[f"{entity}/{project}/{name}"]

    def graphql(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        """The `data` of the answer to one GraphQL operation."""
        with self.lock:
            self.operations.append(operation)
            answer = _OPERATIONS.get(operation)
            if answer is None:
                raise KeyError(f"this stand-in does not know the operation {operation}")
            return answer(self, v)

    def find(self, v: dict[str, Any]) -> Run | None:
        name = v.get("name") or v.get("run") or v.get("runName")
        entity = v.get("entity") or v.get("entityName") or ENTITY
        return self.runs.get(f"{entity}/{v.get('project') or 'uncategorized'}/{name}")

    def file_stream(self, run: Run, body: dict[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            lines = chunk["content"]
            if name == "wandb-history.jsonl" and not self.loses_rows:
                run.put(chunk["offset"], lines)
            elif name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
            elif name == "wandb-events.jsonl":
                run.events = chunk["offset"] + len(lines)
        if body.get("complete"):
            run.set_state("finished" if body.get("exitcode") == 0 else "failed")


def _run_fields(run: Run) -> dict[str, Any]:
    steps = [row.get("_step", -1) for row in run.rows.values()]
    keys = sorted({key for row in run.rows.values() for key in row})
    return {
        "id": f"storage-{run.number}", "projectId": "1", "name": run.name, "displayName": run.display_name,
        "sweepName": None, "state": run.state, "config": json.dumps(run.config), "group": run.group,
        "jobType": run.job_type, "commit": None, "readOnly": False, "createdAt": "2026-01-01T00:00:00Z",
        "heartbeatAt": "2026-01-01T00:00:00Z", "description": "", "notes": "", "tags": run.tags,
        "systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary), "user": {"name": "T", "username": ENTITY},
        "historyLineCount": len(run.rows), "logLineCount": 0, "eventsLineCount": run.events,
        "historyTail": json.dumps([json.dumps(row) for row in run.history()[-1:]]), "eventsTail": "[]",
        "wandbConfig": json.dumps({"t": 1}),
        "historyKeys": {"lastStep": max(steps, default=-1), "sets": [], "keys": {
            key: {"typeCounts": [{"type": "number", "count": 1}], "monotonic": False} for key in keys
        }},
        "project": {"id": "project-1", "name": run.project, "entity": {"id": "entity-1", "name": run.entity}},
    }  # fmt: skip


def _upsert(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    entity, project = v.get("entity") or ENTITY, v.get("project") or "uncategorized"
    name = v.get("name")
    run = next((r for r in b.runs.values() if f"storage-{r.number}" == v.get("id")), None)
    run = run or b.runs.get(f"{entity}/{project}/{name}")
    inserted = run is None
    if run is None:
        run = Run(entity, project, str(name), len(b.runs) + 1, display_name=v.get("displayName") or str(name))
        b.runs[f"{entity}/{project}/{name}"] = run
    if inserted or v.get("state"):
        run.set_state(v.get("state") or "running")
    run.display_name = v.get("displayName") or run.display_name
    run.group, run.job_type = v.get("groupName") or run.group, v.get("jobType") or run.job_type
    run.tags = v.get("tags") or run.tags
    if v.get("config"):
        run.config = json.loads(v["config"])
    if v.get("summaryMetrics"):
        run.summary = json.loads(v["summaryMetrics"])
    return {"upsertBucket": {"bucket": _run_fields(run), "inserted": inserted}}


def _resume_status(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    run = b.find(v)
    entity = {"id": "entity-1", "name": v.get("entity") or ENTITY}
    bucket = _run_fields(run) if run else None
    return {"model": {"id": "project-1", "name": v.get("project"), "entity": entity, "bucket": bucket}}


def _create_files(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    run = b.find(v)
    if run is None:
        raise KeyError("no such run")
    files = [
        {"name": name, "uploadUrl": f"{b.url}/upload/{run.entity}/{run.project}/{run.name}/{name}"}
        for name in v["files"]
    ]
    return {"createRunFiles": {"runID": f"storage-{run.number}", "uploadHeaders": [], "files": files}}


def _read_run(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    run = b.find(v)
    return {"project": {"run": _run_fields(run) if run else None}}


def _runs(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    """The project's runs, the oldest first, all on one page. The only filter that is known is a tag."""
    wanted = json.loads(v.get("filters") or "{}")
    if unknown := wanted.keys() - {"tags"}:
        raise KeyError(f"this stand-in does not know the filter {unknown}")
    entity, project = v.get("entity") or ENTITY, v["project"]
    mine = [run for run in b.runs.values() if (run.entity, run.project) == (entity, project)]
    if not mine:
        return {"project": None}
    found = [run for run in mine if not wanted or wanted["tags"] in run.tags]
    edges = [{"node": _run_fields(run), "cursor": str(run.number)} for run in found]
    page = {"endCursor": None, "hasNextPage": False}
    return {"project": {
        "internalId": "1", "runCount": len(found), "readOnly": False, "runs": {"edges": edges, "pageInfo": page},
    }}  # fmt: skip


def _history_page(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    run = b.find(v)
    rows = [] if run is None else run.shown(b.late)
    page = [json.dumps(row) for row in rows if v["minStep"] <= row.get("_step", 0) < v["maxStep"]]
    return {"project": {"run": {"history": page[: v["pageSize"]]}}}


def _sampled(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    """The rows of a range (both ends included) that have all the keys asked for, with these keys only."""
    spec, run = json.loads(v["spec"]), b.find(v)
    low, high, keys = spec.get("minStep") or 0, spec.get("maxStep") or 1 << 62, spec["keys"]
    page = [
        {key: row[key] for key in keys}
        for row in (run.shown(b.late) if run else [])
        if low <= row.get("_step", 0) <= high and all(key in row for key in keys)
    ]
    return {"project": {"run": {"sampledHistory": [page]}}}


def _parquet(b: Backend, v: dict[str, Any]) -> dict[str, Any]:
    run = b.find(v)
    return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": run.shown(b.late) if run else []}}}}


_VIEWER = {
    "id": "user-1", "entity": ENTITY, "username": ENTITY, "email": "t@example.invalid", "flags": "{}",
    "teams": {"edges": [{"node": {"name": ENTITY}}]},
}  # fmt: skip

_OPERATIONS: dict[str, Any] = {
    "Viewer": lambda b, v: {"viewer": _VIEWER},
    "GetDefaultEntity": lambda b, v: {"viewer": {**_VIEWER, "defaultEntity": {"name": ENTITY}}},
    "ServerFeaturesQuery": lambda b, v: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda b, v: {"entity": {"organization": None}},
    "RunStoppedStatus": lambda b, v: {"project": {"run": {"stopped": False}}},
    "UpsertBucket": _upsert,
    "RunResumeStatus": _resume_status,
    "CreateRunFiles": _create_files,
    "Run": _read_run,
    "RunState": _read_run,
    "Runs": _runs,
    "RunHistoryKeys": _read_run,
    "RunParquetHistory": _parquet,
    "HistoryPage": _history_page,
    "SampledHistoryPage": _sampled,
}


def _handler(b: Backend) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def answer(self, status: int, data: Any) -> None:
            text = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            body = self.body()
            b.asked += 1
            b.hang.wait()
            if b.refuses:
                self.answer(b.refuses, {"errors": [{"message": f"the stand-in says {b.refuses}"}]})
                return
            path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if path == ["graphql"]:
                self.graphql(json.loads(body))
            elif path[0] == "files" and path[-1] == "file_stream":
                with b.lock:
                    b.file_stream(b.runs["/".join(path[1:4])], json.loads(body))
                self.answer(200, {"limits": {}})
            else:
                self.answer(404, {"error": "not found"})

        def graphql(self, request: dict[str, Any]) -> None:
            name = request.get("operationName") or _operation(request["query"])
            try:
                self.answer(200, {"data": b.graphql(name, request.get("variables") or {})})
            except KeyError as error:
                self.answer(200, {"data": None, "errors": [{"message": str(error)}]})

        def do_PUT(self) -> None:
            body = self.body()
            path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            with b.lock:
                b.runs["/".join(path[1:4])].files["/".join(path[4:])] = body
            self.answer(200, {})

        def do_GET(self) -> None:
            self.answer(404, {"error": "not found"})

    return Handler


def _operation(query: str) -> str:
    """The name in `query Name(…)`; "" for an anonymous one."""
    words = query.replace("(", " ").replace("{", " ").split()
    return next((words[i + 1] for i, w in enumerate(words[:-1]) if w in ("query", "mutation")), "")


@contextlib.contextmanager
def backend() -> Iterator[Backend]:
    """A running stand-in; it is gone when the block ends."""
    b = Backend()
    try:
        yield b
    finally:
        b.hang.set()
        b.go_away()


def environment(directory: Path, mode: str, url: str = "http://127.0.0.1:9") -> dict[str, str]:
    """The environment of a process that uses wandb: no variable of the caller's W&B, own directories, no network."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {
        "WANDB_MODE": mode, "WANDB_BASE_URL": url, "WANDB_API_KEY": API_KEY, "WANDB_DIR": str(directory),
        "WANDB_CACHE_DIR": str(directory / "cache"), "WANDB_CONFIG_DIR": str(directory / "config"),
        "WANDB_DATA_DIR": str(directory / "data"), "WANDB_ARTIFACT_DIR": str(directory / "artifacts"),
        "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false", "WANDB_X_DISABLE_STATS": "true", "WANDB_X_DISABLE_META": "true",
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    return env
