# `make` lists the targets. Needs Python >= 3.11 and, for the first install, a package index.
# PYTHON, VENV and ARGS are taken from make's command line only, never from the environment:
#   make test PYTHON=python3.12 VENV=.venv-3.12 ARGS="-k projector"
PYTHON =
VENV = .venv
ARGS =

BIN = $(VENV)/bin
# CI gives another one, which is faster.
INSTALL = $(BIN)/python -m pip install --no-user --quiet --disable-pip-version-check
# One worker for each core this process may use (xdist's `auto` counts those of the machine); more
# than four only compete for memory.
PYTEST = $(BIN)/python -m pytest -n $$(nproc 2>/dev/null || echo 2) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Variables of the caller that would send the install elsewhere, import foreign code, or start JAX
# on another backend than the installed one. The package index stays the caller's choice.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS PYTHONOPTIMIZE PYTHONDONTWRITEBYTECODE PYTEST_ADDOPTS
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_ONLY_BINARY PIP_NO_BINARY PIP_NO_BUILD_ISOLATION
unexport JAX_PLATFORMS JAX_PLATFORM_NAME JAX_NUM_CPU_DEVICES JAX_ENABLE_X64 JAX_DISABLE_JIT JAX_DEBUG_NANS XLA_FLAGS

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install install-test install-browser install-buckets install-interop quickstart test test-slow mutate docs site lint format types ci lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# An environment whose Python is gone (upgraded, moved) is made anew.
$(shell test -x $(BIN)/python || rm -f $(VENV)/.created $(VENV)/.installed $(VENV)/.installed-test)

# The interpreter is looked for only when there is no environment yet. The file written last marks a
# finished one, so that an interrupted run starts over.
$(VENV)/.created:
	@python='$(PYTHON)'; \
	is_new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if [ -z "$$python" ]; then \
	  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	    if is_new_enough "$$candidate"; then python=$$candidate; break; fi; \
	  done; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "make: needs Python 3.11 or newer, found: $$(python3 --version 2>&1 | head -n 1); name one with make PYTHON=..." >&2; \
	  exit 1; \
	elif ! is_new_enough "$$python"; then \
	  echo "make: needs Python 3.11 or newer, but PYTHON=$$python is: $$("$$python" --version 2>&1 | head -n 1)" >&2; \
	  exit 1; \
	elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "make: $$python lacks the standard module venv or ensurepip (Debian and Ubuntu: install python3-venv)" >&2; \
	  exit 1; \
	fi; \
	"$$python" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: requirements.lock pyproject.toml $(VENV)/.created
	@echo "Installing into $(VENV) from requirements.lock (about a minute) ..."
	@$(INSTALL) -r requirements.lock
	@$(INSTALL) --no-deps -e .
	@touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	@echo "Installing into $(VENV) from requirements-test.lock ..."
	@$(INSTALL) -r requirements-test.lock
	@touch $@

install: $(VENV)/.installed ## create the environment from the lock file

install-test: $(VENV)/.installed-test ## the same plus the extras test and docs

# Chromium of the system, else Debian's (as root), else the one that playwright downloads.
install-browser: $(VENV)/.installed-test ## what the tests of the report's page need besides: playwright and a Chromium
	@$(INSTALL) -c requirements-test.lock -e '.[browser]'
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } || \
	  $(BIN)/python -m playwright install chromium

# On loopback; nothing of a cloud is used. moto's botocore needs a python-dateutil below 3, so the lock's is no constraint
# here: with it pip would try every version of moto.
install-buckets: $(VENV)/.installed-test ## what the tests of buckets need besides: servers of S3 and of Google Cloud Storage
	@mkdir -p .cache && grep -v '^python-dateutil==' requirements-test.lock >.cache/buckets.lock
	@$(INSTALL) -c .cache/buckets.lock -e '.[buckets-test]'

install-interop: $(VENV)/.installed-test ## what the tests of weights for PyTorch, timm, transformers need besides: gigabytes
	@$(INSTALL) -c requirements-test.lock -e '.[interop-test]'

quickstart: $(VENV)/.installed ## pre-train on small images that scikit-learn ships; prints k-NN and probe accuracy and where its report is
	@$(BIN)/python -m crate_jax.main --config=configs/quickstart.py:method=vibcreg --workdir=runs/quickstart $(ARGS)

test: $(VENV)/.installed-test ## the quick tests
	@$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(VENV)/.installed-test ## the tests marked slow, with programs compiled as users do
	@$(PYTEST) -m slow --optimised $(ARGS)

mutate: $(VENV)/.installed-test ## break the code, one place at a time: each row of tests/mutations.toml must be noticed
	@$(BIN)/python -m tests.mutate $(ARGS)

docs: $(VENV)/.installed-test ## write the generated pages anew: all keys, all bad inputs
	@mkdir -p .cache
	@$(BIN)/python -m tests.config_page > .cache/page && mv .cache/page docs/config.md
	@$(BIN)/python -m tests.bad_inputs > .cache/page && mv .cache/page docs/bad_inputs.md

site: $(VENV)/.installed-test ## build/site: the pages of docs/ as a site; a broken link or equation is an error
	@$(BIN)/python -m sphinx -q -W -d build/doctrees -c docs . build/site
	@echo "build/site/index.html"

lint: $(VENV)/.installed-test ## ruff: rules and format, without changing a file; shellcheck; hadolint
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/shellcheck -x .ci/run launch/*.sh
	@$(BIN)/hadolint launch/Dockerfile

format: $(VENV)/.installed-test ## ruff: fix what can be fixed, and format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

types: $(VENV)/.installed-test ## mypy
	@$(BIN)/python -m mypy

ci: ## what CI runs: lint, types, tests, and the tests on a second Python
	@.ci/run

# One file serves every Python from 3.11 on: markers choose between jax 0.10 (3.11) and newer.
# Kept pins stay unless ARGS=--upgrade. The second file takes the first one's pins.
LOCK = $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate $(ARGS)
lock: $(VENV)/.created ## write both lock files anew (ARGS=--upgrade takes the newest versions)
	@$(BIN)/python -m pip install --no-user --quiet --disable-pip-version-check uv
	@$(LOCK) --output-file requirements.lock pyproject.toml
	@$(LOCK) --output-file requirements-test.lock --extra test --extra docs --constraint requirements.lock pyproject.toml

clean: ## remove the environments and caches; runs/ stays
	@rm -rf .venv .venv-* .cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
