"""Megatron's own text-generation servers on a CPU, from the wheel, which has no `tools/`.

    serve_cpu.py --serve static|dynamic --load DIR --ckpt-step N --use-checkpoint-args --port P …
    serve_cpu.py --serve forward --texts FILE --load DIR …    no server: the log-probabilities of each text's tokens

It is `server: {script: …}` in the tests: what it builds is what `tools/run_text_generation_server.py` and
`examples/inference/launch_inference_server.py` of a checkout build. The model, the engines and the web servers are
Megatron's own. Three things are not: CUDA (see shim.py), the flash-attn kernels (in torch below), and for the static
server two repairs that Megatron 0.17 to 0.19 need on any machine (see `_repair_static`).

Like its neighbour it is run, never imported, but by children of its process that import their parent's script again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.machinery
import json
import sys
import threading
import types
from pathlib import Path
from typing import Any

import shim  # found beside the script: its directory comes first in the module path
import torch

CPU = (
    "--distributed-backend", "gloo", "--use-cpu-initialization", "--transformer-impl", "local",
    "--attention-backend", "unfused", "--no-masked-softmax-fusion", "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion",
    "--inference-dynamic-batching-buffer-size-gb", "0.05",
)  # fmt: skip


# ---------------------------------------------------------------------- flash-attn, on a CPU


def _pages(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` entries of a request's cache, whose blocks lie where `table` says."""
    return cache[table[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[m, heads, d] queries of the last m of n positions, causal."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k) * scale
    m, n = scores.shape[1:]
    later = torch.arange(n)[None] > torch.arange(n - m, n)[:, None]
    return torch.einsum("hmn,nhd->mhd", scores.masked_fill(later, float("-inf")).softmax(-1), v)


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *_: int,
    softmax_scale: float, block_table: torch.Tensor, **__: Any,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros_like(q)
    for i, table in enumerate(block_table[: len(cu_q) - 1]):
        rows, length = slice(int(cu_q[i]), int(cu_q[i + 1])), int(cu_k[i + 1] - cu_k[i])
        if rows.stop > rows.start:
            out[rows] = _attend(q[rows], _pages(k, table, length), _pages(v, table, length), softmax_scale)
    return out


def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_seqlens: torch.Tensor,
    softmax_scale: float, block_table: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        if length:
            k, v = (_pages(cache, block_table[i], length) for cache in (k_cache, v_cache))
            out[i] = _attend(q[i], k, v, softmax_scale)
    return out


def _install() -> None:
    """Before anything of Megatron is imported, in every process."""
    shim.install()
    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    flash.__dict__.update(
        __version__="2.8.0", flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )  # fmt: skip
    sys.modules["flash_attn"] = flash
    run = threading.Thread.run

    def shimmed(self: threading.Thread) -> None:      # what "cuda" means is known to each thread by itself
        with shim._CudaIsCpu():
            run(self)

    threading.Thread.run = shimmed  # type: ignore[method-assign]


_install()

# ---------------------------------------------------------------------- the servers


def main() -> None:
    import megatron.core.inference.communication_utils as communication
    import megatron.core.inference.contexts.dynamic_context as dynamic_context
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, get_tokenizer
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models import GPTModelBuilder

    shim.after_import()
    sys.argv += CPU
    communication._is_cuda = lambda tensor: None
    dynamic_context.triton_append_key_value_cache = None    # there is a way in torch as well
    parse_and_validate_args(
        extra_args_provider=_arguments,
        args_defaults={"no_load_rng": True, "no_load_optim": True, "exit_on_missing_checkpoint": True},
    )
    initialize_megatron()
    args = get_args()
    builder = GPTModelBuilder(gpt_config_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    load_checkpoint(models, None, None, strict=False)
    model = models[0].eval()
    ways = {"static": torch.inference_mode()(_static), "dynamic": _dynamic, "forward": _forward}
    ways[args.serve](args, model, get_tokenizer())


def _arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--serve", choices=("static", "dynamic", "forward"), required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    return parser


def _static(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )
    from megatron.core.inference.text_generation_server import MegatronServer

    _repair_static()
    context = StaticInferenceContext(args.inference_max_requests, args.inference_max_seq_length)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
    # Megatron falls back on the legacy engine where the other's 40 GB of cache are not to be had.
    server = MegatronServer(StaticInferenceEngine(controller, legacy=True), args)
    server.run(args.host, port=args.port)


def _repair_static() -> None:
    """Give transformers' tokenizers the method that the static server asks every tokenizer for. The other fault, an
    argument that `tools/run_text_generation_server.py` asks for by a name that it does not have, is repaired above by
    the right name."""
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    def offsets(self: Any, ids: list[int], text: str) -> list[int]:
        return [len(self.tokenizer.decode(ids[:i])) for i in range(len(ids))]

    assert not hasattr(HuggingFaceTokenizer, "offsets"), "Megatron has repaired it: remove this"
    HuggingFaceTokenizer.offsets = offsets


def _dynamic(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    from megatron.core.inference.apis import MegatronAsyncLLM, ServeConfig
    from megatron.training.argument_utils import inference_cfg_from_args

    args.return_log_probs = True    # of the prompt too
    config = inference_cfg_from_args(args).to_inference_config(model, enable_cuda_graphs=False)

    async def serve() -> None:
        async with MegatronAsyncLLM(
            model=model, tokenizer=tokenizer, inference_config=config, coordinator_host=args.host,
            coordinator_port=args.inference_coordinator_port,
        ) as engine:  # fmt: skip
            await engine.serve(ServeConfig(host=args.host, port=args.port, frontend_replicas=1), blocking=True)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


@torch.no_grad()
def _forward(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    """One pass of the model over each text, without any engine or cache, into `FILE.logprobs`."""
    found = []
    for text in json.loads(args.texts.read_text()):
        ids = torch.tensor([tokenizer.tokenize(text)])
        length = ids.shape[1]
        mask = torch.tril(torch.ones(1, 1, length, length)) < 0.5
        logits = model(ids, torch.arange(length)[None], mask)
        logprobs = logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(logprobs.tolist())
    args.texts.with_suffix(".logprobs").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
