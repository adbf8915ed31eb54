"""A stand-in judge: no model, but a server that speaks OpenAI's API, so that the example runs without an account.

It is shown two lines of code, as the real judge is, and gives each a score by the names that it has in common with
the line that really follows. Keywords, punctuation and letters do not count: they are so common that the same few
characters after every question would win against many lines. With an API key use a real judge; see README.md.
"""

from __future__ import annotations

import argparse
import json
import keyword
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAME = "stand-in-judge"
PARTS = re.compile(r"<code>\n(.*)\n</code>.*<line_1>\n(.*)\n</line_1>.*<line_2>\n(.*)\n</line_2>", re.DOTALL)
"""How prompts.jsonl puts the code and the two lines."""


COMMON = {*keyword.kwlist, "self"}
"""Words that say nothing about what a line does."""


def names(line: str) -> Counter[str]:
    return Counter(word for word in re.findall(r"[^\W\d]\w*", line) if word not in COMMON)


def score(answer: str, reference: str) -> float:
    """10 for the line itself, 1 for none; else from 2, no name in common, to 9, the same names: their F1."""
    if answer.strip() == reference.strip():
        return 10
    if not answer.strip():
        return 1
    written, right = names(answer), names(reference)
    either = written.total() + right.total()
    return round(2 + 7 * 2 * (written & right).total() / either, 2) if either else 2


def review(prompt: str, references: dict[str, str]) -> str:
    found = PARTS.search(prompt)
    if found is None or found[1] not in references:
        return f"{NAME}: this is no question of the file that it knows the answers of"
    first, second = (score(answer, references[found[1]]) for answer in (found[2], found[3]))
    explanation = f"{NAME}: which names each line shares with the one that really follows: {references[found[1]]}"
    return json.dumps({"explanation": explanation, "score_1": first, "score_2": second})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    references: dict[str, str]

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.answer(404, {"error": {"message": f"{self.path}: no such path"}})
            return
        model = {"id": NAME, "object": "model", "created": 0, "owned_by": "the example"}
        self.answer(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or asked["model"] != NAME:
            return self.answer(404, {"error": {"message": f"there is only {NAME} here, and only chat completions"}})
        text = review(asked["messages"][-1]["content"], self.references)
        spent = {"prompt_tokens": sum(len(m["content"].split()) for m in asked["messages"]),
                 "completion_tokens": len(text.split())}  # fmt: skip
        return self.answer(200, {
            "id": "review", "object": "chat.completion", "created": 0, "model": NAME,
            "choices": [{
                "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}
            }],
            "usage": spent | {"total_tokens": sum(spent.values())},
        })  # fmt: skip

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=Path, default=HERE / "out/data/questions.jsonl", help="what data.py wrote")
    parser.add_argument("--port", type=int, default=8401, help="0 takes a free one")
    args = parser.parse_args()

    lines = args.questions.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    Handler.references = {q["text"]: q["reference"] for q in questions}
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    place = f"http://127.0.0.1:{server.server_port}/v1"
    print(f"{NAME} (no model: it compares with the right answer) at {place}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
