"""Local tasks for lm_eval, each with its documents: choices, generation with two filters, text, and a group."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    {"question": f"def f{i}(x):", "choices": ["return x", "yield from y", "pass"], "gold": i % 3} for i in range(11)
]
QUESTIONS.append(QUESTIONS[3])      # one stands there twice
TEXTS = ["def f(x):\n    return x\n", "The quick brown fox. " * 3, "value_1 = 1  # a line"]
GENERATE = [{"q": f"print({i})", "a": str(i)} for i in range(5)]

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
"""
GEN = """\
task: tiny_gen
dataset_path: json
dataset_kwargs: {data_files: {validation: tasks/gen.jsonl}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
filter_list:
  - {name: number, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TEXT = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 2.0}
"""
GROUP = """\
group: tiny
task: [tiny_choice, tiny_gen]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


def write(base: Path) -> Path:
    """The directory `base`/tasks with all of them; their data files are named relative to `base`."""
    tasks = base / "tasks"
    tasks.mkdir()
    for name, definition in (("choice", CHOICE), ("gen", GEN), ("text", TEXT), ("group", GROUP)):
        (tasks / f"{name}.yaml").write_text(definition)
    for name, rows in (("choice", QUESTIONS), ("gen", GENERATE), ("text", [{"page": text} for text in TEXTS])):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks
