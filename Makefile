# Everything runs from .venv, which the first target that needs it builds and the others leave alone.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
IMAGE_PREFIX ?=
DOCKER_ARGS ?=
TORCH_INDEX_URL ?=
LEARNER_TORCH_INDEX_URL ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help train test check bench chaos image chart cluster-test lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Pass options with ARGS, for example: make test ARGS="tests/unit -k vtrace"'

train: .venv/.installed ## train on this machine: parameter server, learner and actors as processes
	$(BIN)/impala train $(ARGS)

test: .venv/.installed ## run the tests
	$(BIN)/pytest -m 'not cluster' $(if $(ARGS),$(ARGS),tests)

check: .venv/.installed ## lint, formatting, types, import rules, chart
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python helm/generate.py --check
	@if command -v helm >/dev/null; then helm lint --strict --quiet helm; \
	else echo 'make check: helm is not installed, the chart was not linted' >&2; test -z "$$CI"; fi

chart: .venv/.installed ## write the chart's values.schema.json and the table of values in its README
	$(BIN)/python helm/generate.py

cluster-test: .venv/.installed ## run the tests against the cluster of KUBECONFIG, with the images of `make image`
	@test -n "$$KUBECONFIG" || { echo 'make cluster-test: KUBECONFIG names no cluster' >&2; exit 1; }
	$(BIN)/pytest $(if $(ARGS),$(ARGS),tests/cluster)

bench: .venv/.installed ## measure
	$(BIN)/python -m benchmarks $(ARGS)

chaos: .venv/.installed ## kill, freeze and cut off the pods of a running system; more than an hour
	$(BIN)/python -m benchmarks.chaos $(ARGS)

# The builds of torch come from where the Dockerfile says: make image TORCH_INDEX_URL=... LEARNER_TORCH_INDEX_URL=...
# With a builder that is not BuildKit: make image DOCKER_ARGS=--network=host, and DOCKER_BUILDKIT=0 in the environment.
image: ## build the container images impala-actor and impala-learner
	@command -v docker >/dev/null || { echo 'make image: docker is not installed' >&2; exit 1; }
	for target in actor learner; do \
	    docker build --target $$target --tag $(IMAGE_PREFIX)impala-$$target:$(VERSION) \
	        --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	        --build-arg LEARNER_TORCH_INDEX_URL=$(LEARNER_TORCH_INDEX_URL) \
	        --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) $(DOCKER_ARGS) . || exit; \
	done

# Resolves anew with the oldest Python we support, so that the pins hold on every one. torch stays where
# the old lock has it (move it by hand), and it pins its own CUDA packages, which a CPU build lacks.
lock: ## renew constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	    || { echo 'make lock: needs Python 3.11, the oldest we support; try make lock PYTHON=python3.11' >&2; exit 1; }
	rm -rf build/lock && mkdir -p build
	$(PYTHON) -m venv build/lock
	grep '^torch==' constraints.txt > build/torch.txt
	build/lock/bin/pip install -c build/torch.txt -e '.[dev,vizdoom]'
	{ grep '^#' constraints.txt; \
	  build/lock/bin/pip freeze --all --exclude pip --exclude-editable \
	    | sed -E -e 's/\+[a-z0-9.]+$$//' -e '/^(nvidia|cuda|triton)/d'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock build/torch.txt

clean: ## remove caches and build output; keeps .venv and runs/
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
	find . -name .venv -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -print0 | xargs -0 rm -rf

define check-python
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
    || { echo 'make: needs Python 3.11 or 3.12, and $(PYTHON) is not; name one: make PYTHON=python3.12' >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
    || { echo 'make: $(PYTHON) cannot create virtual environments; on Debian: apt install python3-venv' >&2; exit 1; }
endef

# The stamp is written last, so an interrupted install starts over, and so does a .venv that is half there.
.venv/.installed: pyproject.toml constraints.txt
	$(check-python)
	@echo 'Installing into .venv; the first time takes a minute or two.'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
