"""Results of other programs, and of other queues, become results of a queue: `autoeval-runner import`.

`helm`, `lm_eval` and `queues` read what is there, each into `base.Found`; `publish` makes results of it.
"""
