.DEFAULT_GOAL := help
.PHONY: help run test test-models quality docs release-check sanitize audit format clean

# The first of these that can make virtual environments; the locks were resolved with 3.11.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(VENV)/.locked
LOCKS := requirements/dev.txt requirements/demo.txt
INSTALLED := $(VENV)/.installed
ARGS ?=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-zA-Z%-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(INSTALLED) ## Compress and evaluate the embedded 135M model, end to end, without network
	$(BIN)/rocket-run-pipeline --config rocket/config/default.yaml $(ARGS)

test: $(INSTALLED) ## Run the tests; ARGS="-k knapsack" chooses among them
	$(BIN)/python -m pytest $(ARGS)

# What the locked transformers asks for, and the oldest line that rocket works with, beside the environment.
OLDER := build/transformers-4.57

test-models: $(INSTALLED) $(OLDER) ## The grid of model families on both transformers lines; writes docs/supported.md
	PYTHONPATH=$(OLDER) $(BIN)/python -m pytest tests/models/test_families.py tests/models/test_kinds.py \
		--junitxml=build/grid-4.xml $(ARGS)
	$(BIN)/python -m pytest tests/models/test_families.py tests/models/test_kinds.py --junitxml=build/grid-5.xml $(ARGS)
	$(BIN)/python tests/models/supported.py build/grid-4.xml build/grid-5.xml > docs/supported.md

$(OLDER): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
		transformers==4.57.6 "huggingface_hub<1.0" "tokenizers>=0.22,<=0.23.0"

quality: $(INSTALLED) ## Lint, formatting, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## Write what README and docs/ show of code and results, and the site into build/site
	PYTHONPATH=. $(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

release-check: $(INSTALLED) ## Build wheel and sdist; install and try both in clean environments, with and without g++
	$(BIN)/python tests/release.py

sanitize: $(INSTALLED) ## Fuzz the CPU kernels under AddressSanitizer and UBSan; needs g++
	$(BIN)/python tests/kernels/sanitize.py

AUDIT := build/audit
ADVISORIES := https://pypi.org/pypi/pip/json

audit: ## Look the locked packages up among known vulnerabilities; without a network it says so and lets it be
	@if ! $(PYTHON) -c "import urllib.request; urllib.request.urlopen('$(ADVISORIES)', timeout=20)" 2>/dev/null; then \
		echo "$(ADVISORIES) cannot be reached: the locked packages are not audited" >&2; \
	else \
		test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
			$(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.7,<3"; } && \
		$(AUDIT)/bin/pip-audit --disable-pip --no-deps $(foreach lock,$(LOCKS),-r $(lock)); \
	fi

format: $(INSTALLED) ## Format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark-%: $(INSTALLED) ## Run benchmarks/NAME.py; ARGS=--help lists its sizes and methods
	$(BIN)/python -m benchmarks.$* $(ARGS)

clean: ## Remove the environment, caches and builds; output/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find rocket tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find rocket -name '*.so' -delete

$(LOCKED): $(LOCKS)
	@test -n "$(PYTHON)" || { echo "no python3 >= 3.10 with venv found: make PYTHON=/path/to/it" >&2; exit 1; }
	@echo "installing the locked packages into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/demo.txt
	touch $@

# --no-deps and --no-build-isolation: what is locked is what is used.
$(INSTALLED): $(LOCKED) pyproject.toml $(wildcard setup.py rocket/kernels/*.cpp rocket/kernels/*.h)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
