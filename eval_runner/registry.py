"""Plugins: evaluators, servers, checkpoint adapters, executors and sinks, found by entry point.

Built-in ones register as any other package's do, in the entry points of this distribution; there is no second
list. Names are looked up in the installed packages' metadata, and code is loaded only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from typing import Any, Literal

from autoeval_hooks import fsio
from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner import environments
from eval_runner.config.models import Config, Suite
from eval_runner.evaluators.base import Context, Evaluator
from eval_runner.servers.base import Server
from eval_runner.sinks import base as sinks
from eval_runner.sinks.base import Sink

Kind = Literal["evaluators", "servers", "checkpoints", "executors", "sinks"]

DISTRIBUTION = "autoeval-hooks"


def names(kind: Kind) -> list[str]:
    """The names that installed packages give plugins of this kind, sorted; nothing is loaded."""
    return sorted({point.name for point in entry_points(group=f"autoeval.{kind}")})


def get(kind: Kind, name: str, where: str) -> Any:
    """The plugin's class. `where` is ``"<file>: <key path>"`` of the key that names it.

    Raises ConfigError for a name that no package gives, or more than one, and for a plugin that cannot be loaded:
    a broken plugin harms only those who name it.
    """
    found = [point for point in entry_points(group=f"autoeval.{kind}") if point.name == name]
    if not found:
        raise ConfigError(f"{where}: no {kind[:-1]} is named {name!r}{near(name, names(kind))} {_remedy()}")
    if len(found) > 1:
        owners = " and ".join(sorted(_owner(point) for point in found))
        raise ConfigError(f"{where}: {name!r} is given by {owners}; uninstall one of them")
    try:
        return found[0].load()
    except Exception as error:      # a plugin's import may raise anything
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"{where}: {name!r} of {_owner(found[0])} cannot be loaded ({cause}); install what it lacks, or update it"
        ) from error


def build_evaluators(config: Config, suite: Suite) -> list[Evaluator]:
    """The suite's evaluators, in its order. Raises one ConfigError with what is wrong with any of them."""

    where = f"suites.{suite.name}.evaluators"
    built = _build("evaluators", config, suite.evaluators, where, partial(_context, config))
    first: dict[str, int] = {}
    for i, evaluator in enumerate(built):
        name = getattr(evaluator, "benchmark", "")      # of those whose scores all stand under one name
        if name and first.setdefault(name, i) != i:
            raise ConfigError(
                f"{config.path}: {where}[{i}]: its scores have the name {name!r}, as those of {where}[{first[name]}]; "
                "give it another `name`"
            )
    return built


def build_server(config: Config) -> Server | None:
    """What `server:` names, None where nothing is. Raises one ConfigError with what is wrong with it."""
    if config.server is None:
        return None
    settings = {name: value for name, value in config.server.items() if name != "type"}
    make = get("servers", config.server["type"], f"{config.path}: server.type")
    server: Server = make(settings, _context(config, "server"))
    return server


def build_sinks(
    config: Config, runner: str = "", stopping: Callable[[], bool] = lambda: False
) -> list[Sink]:
    """The configuration's sinks, in its order. Raises one ConfigError with what is wrong with any of them.

    `runner` is the runner's name (without one, a unique one is made), `stopping` is true once it must end.
    """
    name = runner or fsio.unique()

    written = {f"sinks[{i}]": text for i, text in enumerate(config.sinks_text)}

    def context(where: str) -> sinks.Context:
        return sinks.Context(
            queue=config.queue,
            runner=name,
            where=where,
            config_file=str(config.path),
            path_map=config.path_map,
            written=written.get(where, ""),
            stopping=stopping,
        )

    return _build("sinks", config, config.sinks, "sinks", context)


def _context(config: Config, where: str) -> Context:
    return Context(
        base_dir=config.path.parent,
        environments=config.environments or environments.default_root(),
        where=where,
        config_file=str(config.path),
        server=config.server["type"] if config.server else "",
        cache=config.queue / "cache",
    )


def _build(
    kind: Kind, config: Config, entries: list[dict[str, Any]], key: str, context: Callable[[str], Any]
) -> list[Any]:
    built, errors = [], []
    for i, entry in enumerate(entries):
        where = f"{key}[{i}]"
        settings = {name: value for name, value in entry.items() if name != "type"}
        try:
            make = get(kind, entry["type"], f"{config.path}: {where}.type")
            built.append(make(settings, context(where)))
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return built


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def _remedy() -> str:
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return f"({DISTRIBUTION} is not installed here: run `pip install -e .` in its checkout)"
    return "(others come with other packages: pip install the one that has it)"
