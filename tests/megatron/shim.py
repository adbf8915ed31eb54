"""A stand-in for CUDA (and for triton), so that Megatron's training code runs on a CPU. For tests only.

What Megatron puts on "cuda" stays on the CPU, streams and events do nothing, the sizes of memory are made up, and
triton's modules are there and empty. The training loop, its saves, its W&B calls and its processes are Megatron's own.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Call it before anything of Megatron is imported; once more does no harm."""
    if not hasattr(typing, "override"):  # Megatron 0.19 wants Python 3.12; nothing else in it does
        typing.override = lambda method: method  # type: ignore[attr-defined]
    if _EmptyTriton() not in sys.meta_path:
        sys.meta_path.append(_EmptyTriton())
        _replace_cuda()
        _CudaIsCpu().__enter__()
        torch.compile = lambda model=None, **_: model or (lambda f: f)  # type: ignore[assignment]
        torch.set_num_threads(1)


def after_import() -> None:
    """What is bound by name inside Megatron; call it once Megatron is imported."""
    import megatron.core.datasets.utils as datasets
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    datasets.compile_helpers = lambda: None  # C++ for its indexed data sets, which the tests do not use


# ---------------------------------------------------------------------- tensors


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], kinds: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:  # gradient clipping asserts a CUDA type
            return function(*args).replace("torch.", "torch.cuda.")
        if function is torch.Tensor.to:
            args = [_cpu(a) for a in args]
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)


def _cpu(device: Any) -> Any:
    named = device if isinstance(device, str) else device.type if isinstance(device, torch.device) else ""
    return torch.device("cpu") if named.startswith("cuda") else device


# ---------------------------------------------------------------------- torch.cuda


class _Nothing:
    """A stream, an event or a property sheet of which every method does nothing."""

    name, major, minor, total_memory, multi_processor_count = "cpu", 8, 0, 1 << 34, 1

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _answers(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": "cpu",
        "get_device_capability": (8, 0), "get_device_name": "cpu", "get_device_properties": _Nothing(),
        "mem_get_info": (1 << 34, 1 << 34), "is_current_stream_capturing": False,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "device_memory_used": 0,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(cuda, name, _answers(value))
    for name in ("set_device", "synchronize", "empty_cache", "init", "ipc_collect", "reset_peak_memory_stats",
                 "set_stream", "_lazy_init"):  # fmt: skip
        setattr(cuda, name, _answers(None))
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Nothing()
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda._lazy_call = lambda callback, **_: callback()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _answers(None)


# ---------------------------------------------------------------------- triton


class _EmptyTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module `triton…`; each has whatever is asked of it, and none of it does anything."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _EmptyTriton)

    __hash__ = None  # type: ignore[assignment]

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        module.__getattr__ = _anything  # type: ignore[method-assign]


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Error,), {}) if name[0].isupper() else _decorator


class _Error(Exception):
    """What has a capital may be made with anything, asked for in `isinstance`, and caught."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class _Decorator:
    """`@triton.jit`, `@triton.jit(...)`, `tl.constexpr` and the like."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        return _anything(name)

    def __getitem__(self, item: Any) -> Any:
        return self


_decorator = _Decorator()
