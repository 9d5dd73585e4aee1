# Everything a person or CI does here. `make help` lists it. Needs Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that tests run in: two more than there are cores, as many tests wait for servers; each needs 1.5 GB.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 6 ? n + 2 : 8)))
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
WHAT = --constraint constraints.txt --editable '.[dev]'

.DEFAULT_GOAL := help
.PHONY: help demo triton test check bench-serve bench-triton bench-soak bench-search bench-characters bench-kills bench-early-stop bench-train bench-whole-search bench-scaling format proto docs clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment is made once, and again when the dependencies change. Its log stays beside it and is shown only if it fails.
# uv installs what pip would in a quarter of the time; where it does not get at the packages, as it does not read all of pip's settings, pip does.
$(READY): pyproject.toml constraints.txt
	@echo "preparing the environment in $(VENV) (once; 6 GB, a minute or some)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"found Python {sys.version.split()[0]}, expected 3.11 or newer; set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@{ $(PIP) --constraint constraints.txt uv && \
	  UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || echo "$$PIP_INDEX_URL")}" \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python $(WHAT) || $(PIP) $(WHAT); } \
	  > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@

demo: $(READY) ## Evolve, publish, serve and hot-reload four small tasks (6 minutes)
	@$(BIN)/python -m demo

triton: $(READY) ## Make the environment that a real Triton runs in (.triton; 350 MB, 15 seconds)
	@$(BIN)/munet-server triton install

test: $(READY) triton ## Run every test that needs no GPU
	@$(BIN)/python -m pytest -q -m "not gpu" -n $(JOBS) --dist worksteal

check: $(READY) ## Format, lint, types, import contracts, generated code
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }
	@$(BIN)/python proto/generate.py --check
	@echo "format, lint, types, imports and generated code are in order"

bench-serve: $(READY) ## Measure S1 to S11: routes in pieces beside whole models and MLServer, memory, reloads, overload (35 minutes)
	@$(BIN)/python -m benchmarks.serve --results benchmarks/results

bench-triton: $(READY) triton ## Measure which engine when: embedded, Triton with shared and coarse segments, one model a task, the front door on it (14 minutes)
	@$(BIN)/python -m benchmarks.triton --results benchmarks/results

bench-soak: $(READY) ## Soak a server for half an hour: load and faults of every kind, wrong answers and what grows (30 minutes)
	@$(BIN)/python -m benchmarks.soak --results benchmarks/results

bench-search: $(READY) ## Measure Q6 and Q7: what a search costs beside training, in bytes and seconds (5 minutes)
	@$(BIN)/python -m benchmarks.search --results benchmarks/results

bench-characters: $(READY) ## Measure Q1, Q2, Q3 and Q8: searches beside their baselines (hours; goes on where it was stopped)
	@$(BIN)/python -m benchmarks.characters --results benchmarks/results

bench-kills: $(READY) ## Measure Q5: what ten kills cost a search beside the work they lose (15 minutes)
	@$(BIN)/python -m benchmarks.kills --results benchmarks/results

bench-early-stop: $(READY) ## Measure what early judgement saves, and at what loss (20 minutes)
	@$(BIN)/python -m benchmarks.early_stop --results benchmarks/results

bench-train: $(READY) ## Measure T1 to T5: children trained together beside one by one (8 minutes)
	@$(BIN)/python -m benchmarks.train --results benchmarks/results

bench-whole-search: $(READY) ## Measure W1 to W3: a whole search, children one by one beside together and side by side (6 minutes)
	@$(BIN)/python -m benchmarks.whole_search --results benchmarks/results

bench-scaling: $(READY) ## Measure and simulate P1 to P4: what searches cost as tasks, children, layers and devices grow (7 minutes)
	@$(BIN)/python -m benchmarks.scaling --results benchmarks/results

format: $(READY) ## Format the code and mend what the linter can mend
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

proto: $(READY) ## Generate munet/v1 from proto/munet/v1
	@$(BIN)/python proto/generate.py

docs: $(READY) ## Write the tables of docs/operations.md that follow from the code
	@$(BIN)/python docs/generate.py

clean: ## Remove the environment and everything that was built
	@rm -rf $(VENV) .triton .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
