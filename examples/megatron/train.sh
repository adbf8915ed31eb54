#!/usr/bin/env bash
# Trains a small GPT with Megatron-LM. Every checkpoint is evaluated, while training goes on.
# Only two things are about autoeval: `-m autoeval_hooks.megatron` before the script, and `--autoeval-config`.
set -euo pipefail
cd "$(dirname "$0")"

MEGATRON=${MEGATRON:?set it to the directory of Megatron-LM, 0.12 or later}
GPUS=${GPUS:-1}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
ITERATIONS=${ITERATIONS:-2000}
SAVE_INTERVAL=${SAVE_INTERVAL:-200}
RUN=${RUN:-megatron-example}            # another name for another training
OUT=$(realpath -m "${EXAMPLE_OUT:-out}")

export CUDA_DEVICE_MAX_CONNECTIONS=1
export WANDB_RUN_ID=${WANDB_RUN_ID:-$RUN} WANDB_RESUME=allow    # a restart goes on with the same W&B run

model=(
    --num-layers 12 --hidden-size 512 --num-attention-heads 8
    --seq-length 512 --max-position-embeddings 512 --position-embedding-type rope
    --tensor-model-parallel-size "$TENSOR_PARALLEL"
)
training=(
    --micro-batch-size 8 --global-batch-size 64 --train-iters "$ITERATIONS"
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 100
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --bf16 --use-distributed-optimizer
)
data=(
    --data-path "$OUT/data/train_text_document" --split 100,0,0 --eval-iters 0 --eval-interval 1000
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/data/tokenizer"
)
saving=(
    --save "$OUT/run" --load "$OUT/run" --save-interval "$SAVE_INTERVAL" --ckpt-format torch_dist
)
logging=(
    --log-interval 10 --tensorboard-dir "$OUT/tensorboard"
    --wandb-project autoeval-megatron --wandb-exp-name "$RUN"
)

torchrun --standalone --nproc-per-node "$GPUS" -m autoeval_hooks.megatron "$MEGATRON/pretrain_gpt.py" \
    "${model[@]}" "${training[@]}" "${data[@]}" "${saving[@]}" "${logging[@]}" \
    --autoeval-config autoeval.yaml
