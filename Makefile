# `make demo` and `make test` set everything up on a machine with Python 3.10+.
PYTHON ?= python3
# One pinned torch, so that figures compare; any `TORCH=torch>=2.5` will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Small models on two cores lose more to threads waiting for each other than they gain.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-ddpo test test-fast test-long families style docs

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2 \
		training_scripts/train_flow_grpo.py --config training_scripts/recipes/flow_grpo_mini_sd3.yaml

demo-ddpo: $(VENV)/installed
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2 \
		training_scripts/train_ddpo.py --config training_scripts/recipes/ddpo_mini_sd.yaml

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long"

# What needs several processes or a whole training, method by method.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m long

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not long"

# What a policy can do with every pipeline that diffusers exports, into docs/families.md; goes on where it was stopped.
families: $(VENV)/installed
	$(BIN)/python -m tests.families

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site, into site/: strict, so that a broken link or an unknown reference fails.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
