"""`python -m autoeval_hooks submit PATH [--step N] --config FILE`: hand a checkpoint over by hand.
`python -m autoeval_hooks doctor --config FILE`: does this host's file system serve as a queue?
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from dataclasses import asdict

from autoeval_hooks import __version__, config, doctor
from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.findings import Finding, show
from autoeval_hooks.handover import submit

OK, PROBLEM, USAGE, LATER = 0, 1, 2, 75


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 handed over (or already known), nothing wrong; 1 doctor found a problem; 2 for what the user must
    mend, 75 for what may pass."""
    parser = argparse.ArgumentParser(
        prog="python -m autoeval_hooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("submit", help="hand a complete checkpoint over for evaluation")
    one.add_argument("path", help="the checkpoint's directory")
    one.add_argument("--step", type=int, help="the training step that it was saved at (default: what its name says)")
    one.add_argument("--suite", action="append", default=[], help="a suite to use, whatever its cadence (repeatable)")
    one.add_argument("--tokens", type=int, help="tokens that training had consumed")
    other = commands.add_parser("doctor", help="look at the queue's file system from this host, and say what to do")
    other.add_argument("--output-dir", action="append", default=[], help="try to pin checkpoints of it (repeatable)")
    other.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    for command in (one, other):
        command.add_argument("--config", default="autoeval.yaml", help="the configuration (default: %(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        return _submit(args) if args.command == "submit" else _doctor(args)
    except AutoEvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return LATER if error.kind == "transient" else USAGE


def _submit(args: argparse.Namespace) -> int:
    tickets = submit(args.path, step=args.step, config=args.config, suites=tuple(args.suite), tokens=args.tokens)
    for suite, new in tickets.items():
        print(f"{suite}: {'queued' if new else 'known already; nothing to do'}")
    return OK


def _doctor(args: argparse.Namespace) -> int:
    settings = config.load(args.config)
    versions = f"autoeval {__version__}, Python {platform.python_version()}"
    findings = [Finding("ok", "versions", versions), *doctor.check_hook(settings)]
    findings += [doctor.check_pinning(directory, settings.hook.pin) for directory in args.output_dir]
    problems = sum(f.level == "problem" for f in findings)
    if args.json:
        print(json.dumps({"findings": [asdict(f) for f in findings], "problems": problems}, indent=2))
    else:
        print("\n".join(map(show, findings)))
    return PROBLEM if problems else OK


if __name__ == "__main__":
    sys.exit(main())
