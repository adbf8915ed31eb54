"""What `type: command` runs: read a checkpoint, leave scores as JSON. Nothing in it is about autoeval."""

import array
import itertools
import json
import math
import sys
from pathlib import Path

checkpoint, output = map(Path, sys.argv[1:3])
alphabet = json.loads((checkpoint / "tokenizer.json").read_text())["alphabet"]
data = (checkpoint / "model.safetensors").read_bytes()
weights = array.array("f", data[8 + int.from_bytes(data[:8], "little") :])
size, bits, letters, rows = len(alphabet), 0.0, 0, []
for number, line in enumerate(Path("held_out.txt").read_text().splitlines()):
    right = 0
    for first, second in itertools.pairwise(line):
        chances = weights[alphabet.index(first) * size :][:size]
        bits -= math.log2(chances[alphabet.index(second)])
        right += alphabet[chances.index(max(chances))] == second
    letters += len(line) - 1
    rows.append({"id": number, "right": right / (len(line) - 1)})
with (output / "lines.jsonl").open("w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
accuracy = sum(row["right"] for row in rows) / len(rows)
scores = {"bits": bits / letters, "letters": letters, "accuracy": accuracy}
(output / "scores.json").write_text(json.dumps({"results": scores}))
