# `make demo` shows the main job end to end; `make test` runs the tests. Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE    # compiled modules start in half the time

.PHONY: help helm demo test test-demo test-helm test-lm-eval test-loops test-wandb test-sinks test-gpt test-faults test-nfs test-megatron lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         train a small model, evaluate every checkpoint with HELM, and show the report"
	@echo "make test         lint, types and tests"
	@echo "make test-demo    the demo as an acceptance test"
	@echo "make test-helm    HELM killed at work, its tables, and an older toolkit's YAML; 5 minutes"
	@echo "make test-lm-eval the real lm-evaluation-harness, by itself and through servers; 6 minutes"
	@echo "make test-loops   the examples of accelerate, Lightning, TRL and plain PyTorch, to a score; 5 minutes"
	@echo "make test-sinks   a real MLflow server, and TensorBoard's own readers; 2 minutes"
	@echo "make test-wandb   points lost on the way, and a W&B service that is away, hangs or refuses; 5 minutes"
	@echo "make test-gpt     a judge's client killed again and again, and checkpoints answered by transformers serve; 3 minutes"
	@echo "make test-faults  a process killed or paused, and every error, at every call into the file system; 5 minutes"
	@echo "make test-nfs     the queue on a real kernel NFS and through power cuts, in a guest; 10 minutes; see tests/faults/nfs"
	@echo "make test-megatron  real trainings with Megatron-LM on the CPU"
	@echo "make clean        remove what the targets made here"

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

helm: .venv/.ready
	$(BIN)/autoeval-runner env create helm

demo: helm
	$(BIN)/python examples/demo.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint helm
	$(BIN)/python -m pytest -m "not slow and not megatron"

test-demo: helm
	$(BIN)/python -m pytest -m slow tests/acceptance

test-helm: helm
	$(BIN)/python -m pytest -m slow tests/integration -k "(helm or record or watch) and not wandb and not loops"

test-lm-eval: .venv/.ready
	$(BIN)/autoeval-runner env create lm_eval
	$(BIN)/python -m pytest -m slow tests/integration -k lm_eval

test-loops: helm
	$(BIN)/python -m pytest -m slow tests/integration -k "loops and not wandb"

test-sinks: .venv/.ready
	$(BIN)/python -m pytest -m slow tests/integration -k sinks

test-wandb: .venv/.ready
	$(BIN)/python -m pytest -m slow tests/integration -k wandb

test-gpt: .venv/.ready
	$(BIN)/python -m pytest -m slow tests/integration -k "(gpt or transformers) and not lm_eval and not watch"

test-faults: .venv/.ready
	$(BIN)/python -m pytest -m faults tests/faults

test-nfs: .venv/.ready
	$(BIN)/python -m pytest -s -m slow tests/faults/nfs

.venv-megatron/.ready: tests/megatron/requirements.txt tests/megatron/serve.txt .venv/.ready
	rm -rf .venv-megatron
	$(BIN)/pip install --quiet --target .venv-megatron --no-deps --only-binary=:all: --python-version 3.12 -r $<
	$(BIN)/pip install --quiet --target .venv-megatron -r tests/megatron/serve.txt
	@touch $@

test-megatron: helm .venv-megatron/.ready
	$(BIN)/python -m pytest -m megatron tests/megatron

clean:
	rm -rf .venv .venv-megatron demo_output .mypy_cache .ruff_cache .pytest_cache .hypothesis
