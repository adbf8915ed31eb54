"""`autoeval-runner watch`: find complete checkpoints in directories, and hand them over.

In reading order: `plan` (what the options and the file ask for) → `watcher` (look after look) → `looks` (what stands in
a directory) → `complete` (whether a save is over) → `given` (the hand-over) → `described` (what a checkpoint of
Megatron's says of its training); `beside` is the runner that `--run` adds.
"""
