"""`autoeval-runner doctor`: is everything in place, and what is to be done?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import click

from autoeval_hooks.findings import show
from eval_runner import config as configs
from eval_runner import doctor as doctors
from eval_runner import secrets
from eval_runner.cli.options import config_option

PROBLEM = 1


@click.command(short_help="Look at queue, environments and runners; say what to do.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
def doctor(config_file: str, as_json: bool) -> None:
    """Look at the queue's file system, environments, credentials, runners and tickets, and say what to do.

    Takes seconds and changes nothing. Of the network it asks only services that the configuration names. Exit: 0 no
    problem (there may be warnings), 1 a problem.
    """
    findings = doctors.examine(configs.load(config_file, warn=False))
    findings = [replace(f, means=secrets.masked(f.means), do=secrets.masked(f.do)) for f in findings]
    problems = sum(f.level == "problem" for f in findings)
    if as_json:
        click.echo(json.dumps({"findings": [asdict(f) for f in findings], "problems": problems}, indent=2))
    else:
        for finding in findings:
            click.echo(show(finding))
        warnings = sum(f.level == "warning" for f in findings)
        click.echo(f"{problems} problem(s), {warnings} warning(s)", err=True)
    if problems:
        sys.exit(PROBLEM)
