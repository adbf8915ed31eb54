"""The adapter for Megatron-LM: `megatron.training`, 0.12 and later.

    torchrun … -m autoeval_hooks.megatron pretrain_gpt.py … --autoeval-config autoeval.yaml

runs an unchanged script. The patches in `patches/megatron-lm` let Megatron know the flag itself: then no `-m` is
needed. Where arguments come from `--yaml-cfg`, the environment variable AUTOEVAL_CONFIG names the file.

Either way it is `install` that wraps five functions of `megatron.training`. Each wrapper calls the original, whatever
happens in ours. All of ours happens on the last rank, the one that owns W&B; there the training thread reads memory and
nothing else, but for the configuration at the start; all files are touched by a background thread. Before a save, after
which Megatron may delete an earlier checkpoint, it waits for that one's pin, `hook.deadline` seconds at most.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from autoeval_hooks import config as configs
from autoeval_hooks import layouts
from autoeval_hooks.delivery import Delivery, log, never_raise
from autoeval_hooks.errors import ConfigError
from autoeval_hooks.megatron_record import record, samples_at, with_tokenizer_files
from autoeval_hooks.megatron_training import Facts, Training

FLAG, VARIABLE = "--autoeval-config", "AUTOEVAL_CONFIG"
USAGE = 2
_ARGUMENTS = "megatron.training.arguments"
_HELP = "autoeval.yaml, by which every checkpoint is handed over for evaluation"

_training: Training | None = None
_delivery: Delivery | None = None
_expected = False
"""Whether the user has asked for us by the very command: then it is a mistake to name no configuration."""


def install(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser | None:
    """Make Megatron's training in this process tell us what it does. Calling it again does no harm.

    With Megatron's argument `parser`: adds `--autoeval-config` to it, wraps what is to be wrapped, and returns it.
    Without: does the same once Megatron builds its parser. Megatron itself is imported by neither.
    """
    if parser is not None:
        _add_flag(parser)
        _wrap_training()
    elif _ARGUMENTS in sys.modules:
        _wrap_parser(sys.modules[_ARGUMENTS])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
    return parser


@never_raise
def _add_flag(parser: argparse.ArgumentParser) -> None:
    if FLAG not in parser._option_string_actions:
        parser.add_argument(FLAG, type=str, default=None, help=_HELP)


class _OnImport(importlib.abc.MetaPathFinder):
    """Wraps the parser as soon as the script imports Megatron: what a script does before that (the environment,
    adaptors of other hardware) must come before it with us, too."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _ARGUMENTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _wrap_parser(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@never_raise
def _wrap_parser(arguments: ModuleType) -> None:
    def add_arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return install(original(*args, **kwargs))

    _wrap(arguments, "add_megatron_arguments", add_arguments)


@never_raise
def _wrap_training() -> None:
    training = importlib.import_module("megatron.training.training")
    checkpointing = importlib.import_module("megatron.training.checkpointing")
    _wrap(importlib.import_module("megatron.training.wandb_utils"), "on_save_checkpoint_success", _saved)
    _wrap(checkpointing, "save_checkpoint", _save)
    _wrap(training, "save_checkpoint", _save)       # imported there by its name
    _wrap(training, "training_log", _log)
    _wrap(training, "train", _train)


def _wrap(module: ModuleType, name: str, ours: Callable[..., Any]) -> None:
    """Replace a function of a module by `ours`, which gets the original as its first argument; only once."""
    original = getattr(module, name)
    if not hasattr(original, "autoeval"):

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return ours(original, *args, **kwargs)

        wrapped.autoeval = True  # type: ignore[attr-defined]
        setattr(module, name, wrapped)


# ---------------------------------------------------------------------- around Megatron's functions


def _train(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _begin()
    try:
        return original(*args, **kwargs)
    finally:        # it leaves by SystemExit after a signal, or when its time is up
        _end()


def _save(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _save_begins(*args[:1], **kwargs)
    return original(*args, **kwargs)


def _saved(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _save_ends(*args, **kwargs)
    return original(*args, **kwargs)


def _log(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    done = original(*args, **kwargs)
    _logged(original, args)
    return done


@functools.cache
def _place(function: Callable[..., Any], parameter: str) -> int:
    """Where in its positional arguments a function takes `parameter`; beyond the last where it does not."""
    names = list(inspect.signature(function).parameters)
    return names.index(parameter) if parameter in names else sys.maxsize


# ---------------------------------------------------------------------- what is ours: on the last rank, never raising


@never_raise
def _begin() -> None:
    global _training, _delivery
    _training = None
    args = _arguments()
    if args.rank != args.world_size - 1:
        return
    path = getattr(args, "autoeval_config", None) or os.environ.get(VARIABLE)
    if not path:
        if _expected:
            log.warning("autoeval: nothing is handed over: name the configuration by %s or %s", FLAG, VARIABLE)
        return
    if not args.save or "://" in args.save:
        log.warning("autoeval: nothing is handed over: --save names no directory of a file system")
        return
    try:
        config = configs.load(path)
    except ConfigError as error:
        log.warning("autoeval: nothing is handed over, training goes on: %s", error)
        return
    save_dir, here = os.path.abspath(args.save), os.getcwd()
    resumed_at, consumed = args.iteration, args.consumed_train_samples      # these move on
    if _delivery is None:
        _delivery = Delivery()
        atexit.register(_deliver_the_rest, os.getpid())
    _training = Training(
        config, _delivery,
        Facts(
            save_dir=save_dir, resumed_at=resumed_at,
            resumed_here=bool(args.load) and os.path.abspath(args.load) == save_dir,
            planned_last_step=args.train_iters, record=record(args),
            with_files=lambda known: with_tokenizer_files(known, here),
            samples_at=lambda iteration: samples_at(args, iteration, resumed_at=resumed_at, consumed=consumed),
            row_every=args.tensorboard_log_interval if getattr(args, "tensorboard_dir", None) else None,
        ),
    )  # fmt: skip
    _training.begins()


@never_raise
def _save_begins(iteration: int, *, non_persistent_ckpt: bool = False, **_: Any) -> None:
    if _training is not None and not non_persistent_ckpt:
        _training.save_begins(iteration, _arguments().consumed_train_samples)


@never_raise
def _save_ends(checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int) -> None:
    args, path = _arguments(), os.path.abspath(checkpoint_path)
    if _training is None or getattr(args, "ckpt_convert_format", None) is not None:
        return
    if os.path.abspath(save_dir) != _training.facts.save_dir:
        return      # a passing save, which Megatron replaces
    if path.endswith(".pt"):        # `torch`: …/iter_0000010/mp_rank_00/model_optim_rng.pt
        path = os.path.dirname(os.path.dirname(path))
    if layouts.ITERATION.fullmatch(os.path.basename(path)):
        _training.saved(path, iteration, None if args.async_save else args.consumed_train_samples)


@never_raise
def _logged(original: Callable[..., Any], args: tuple[Any, ...]) -> None:
    place = _place(original, "iteration")       # versions differ in what stands before it
    if _training is not None and place < len(args):
        _training.logged(args[place])


@never_raise
def _end() -> None:
    if _training is not None:
        _training.ends()


@never_raise
def _deliver_the_rest(pid: int) -> None:
    """The end of the process: a last save may come after training, and be complete after W&B's end only."""
    if _training is not None and os.getpid() == pid:
        _training.deliver_the_rest()


def _arguments() -> Any:
    return sys.modules["megatron.training.global_vars"].get_args()


# ---------------------------------------------------------------------- the way in without a patch


def main(argv: list[str]) -> int:
    """Run the training script `argv[0]` with the rest as its arguments, as Python itself would run it."""
    global _expected
    script = argv[0] if argv else ""
    if not os.path.isfile(script):
        if os.environ.get("RANK", "0") == "0":
            wrong = f"{script}: no such file" if script and not script.startswith("-") else "the script is missing"
            print(f"error: {wrong}; write `-m autoeval_hooks.megatron pretrain_gpt.py ARGUMENTS`", file=sys.stderr)
        return USAGE
    _expected = True
    install()
    sys.argv = list(argv)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    # Not this copy of the module, which nobody else could import: a patched Megatron calls `install`, too.
    sys.exit(importlib.import_module("autoeval_hooks.megatron").main(sys.argv[1:]))
