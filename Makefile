# `make demo` and `make test` set everything up on a machine with Python 3.10+.
PYTHON ?= python3
# One pinned torch, so that figures compare; any `TORCH=torch>=2.5` will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Small models on two cores lose more to threads waiting for each other than they gain.
export OMP_WAIT_POLICY ?= PASSIVE
# Two workers take files in the order of tests/conftest.py; xdist's own puts those with many tests first, whatever they take.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-ddpo test test-fast test-long verify verify-record families versions versions-oldest versions-newest style docs

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
	$(BIN)/python -m pytest -q $(TWO) -m "not long"

# What needs several processes or whole trainings, method by method and model by model.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -q $(TWO) -m long

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -q $(TWO) -m "not slow and not long"

# The mini recipes again, minutes each, compared with benchmarks/curves/; goes on where it was stopped. RECIPES='draft_mini_sd3 nft_mini_sd3' runs these alone.
RECIPES ?=

verify: $(VENV)/installed
	$(BIN)/python -m benchmarks.verify $(RECIPES)

verify-record: $(VENV)/installed
	$(BIN)/python -m benchmarks.verify --record $(RECIPES)

# What a policy can do with every pipeline that diffusers exports, into docs/families.md; goes on where it was stopped.
families: $(VENV)/installed
	$(BIN)/python -m tests.families

# Both ends of the range of versions that pyproject.toml allows, each in an environment of its own inside $(VENV).
OLDEST ?= $(VENV)/oldest
NEWEST ?= $(VENV)/newest
TOOLS := ftfy protobuf pytest pytest-xdist sentencepiece
TESTED := tests/schedulers tests/embedded tests/rewards/test_clip_score.py tests/training/run/test_load_dtype.py tests/whole/test_families.py tests/whole/test_matrix.py tests/whole/test_patches.py

versions: versions-oldest versions-newest

$(OLDEST)/installed: pyproject.toml tests/families/oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "$(TORCH)"
	$(OLDEST)/bin/pip install --quiet --constraint tests/families/oldest.txt -e . $(TOOLS)
	touch $@

versions-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -q $(TWO) -p no:cacheprovider $(TESTED)

# What broke in the newest releases: they are looked for each time. Then every pipeline (half an hour, goes on where it was stopped), and docs/families.md stays.
versions-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet "$(TORCH)"
	$(NEWEST)/bin/pip install --quiet --upgrade accelerate diffusers huggingface_hub peft transformers "$(TORCH)" -e . $(TOOLS)
	status=0; $(NEWEST)/bin/python -m pytest -q $(TWO) -p no:cacheprovider $(TESTED) || status=1; \
		$(NEWEST)/bin/python -m tests.families '*' --results runs/families_newest.jsonl || status=1; exit $$status

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site, into site/: strict, so that a broken link or an unknown reference fails.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
