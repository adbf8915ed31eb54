"""`python -m autoeval_hooks submit PATH --step N --config FILE`: hand a checkpoint over by hand."""

from __future__ import annotations

import argparse
import logging
import sys

from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.handover import submit

OK, USAGE, LATER = 0, 2, 75


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 handed over (or already known), 2 for what the user must mend, 75 for what may pass."""
    parser = argparse.ArgumentParser(prog="python -m autoeval_hooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("submit", help="hand a complete checkpoint over for evaluation")
    one.add_argument("path", help="the checkpoint's directory")
    one.add_argument("--step", type=int, required=True, help="the training step that it was saved at")
    one.add_argument("--config", default="autoeval.yaml", help="the configuration (default: %(default)s)")
    one.add_argument("--suite", action="append", default=[], help="a suite to use, whatever its cadence (repeatable)")
    one.add_argument("--tokens", type=int, help="tokens that training had consumed")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        tickets = submit(
            args.path, step=args.step, config=args.config, suites=tuple(args.suite), tokens=args.tokens
        )
    except AutoEvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return LATER if error.kind == "transient" else USAGE
    for suite, new in tickets.items():
        print(f"{suite}: {'queued' if new else 'known already; nothing to do'}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
