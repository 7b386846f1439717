# venv  the pinned environment, in .venv            demo   the three stages on a laptop CPU, from real pictures and video
# test-fast  the tests that start no trainer        test   all tests but the demo and Slurm's
# test-demo  the demo, checked                      lint   ruff and mypy
# test-slurm  the pipeline on a real Slurm, started here (minutes; as root, needs slurmctld, slurmd, munge)
# container-test  build the Dockerfile with buildah and run the tiny demo inside (see docs/container.md)
# fixtures  regenerate tests/fixtures               clean  remove what the other targets made (not .venv)

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
DEMO_ARGS ?=

.PHONY: venv demo test-fast test test-demo test-slurm container-test lint fixtures clean
.DEFAULT_GOAL := demo

venv: $(STAMP)

# --no-deps: the pins are complete, and NeMo's metadata asks for packages (a CUDA torch among them) that a CPU run does not need.
$(STAMP): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "molmo2: python3.11 not found; install it (Debian/Ubuntu: apt install python3.11 python3.11-venv) or call make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "molmo2: the pins are for Python 3.11, $(PYTHON) is $$($(PYTHON) -V 2>&1); call make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "molmo2: cannot make a virtual environment; install the venv module (Debian/Ubuntu: apt install python3.11-venv)" >&2; exit 2; }
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip -q || { echo "molmo2: $(VENV) has no pip; remove $(VENV), install python3.11-venv, call make venv again" >&2; exit 2; }
	@echo "installing the pinned environment into $(VENV) (about 2.4 GB, a few minutes the first time)"
	@$(PIP) install -qq --no-deps -r requirements/cpu.txt -r requirements/dev.txt || { echo "molmo2: pip could not install the pins, see above; docs/install.md lists the usual causes" >&2; exit 2; }
	@$(PIP) install -qq --no-deps --no-build-isolation -e . || { echo "molmo2: pip could not install the package, see above" >&2; exit 2; }
	@$(BIN)/python -c 'import torch' || { echo "molmo2: torch does not import; on Linux use a CPU wheel, see docs/install.md" >&2; exit 2; }
	@touch $@

demo: $(STAMP)
	@$(BIN)/molmo2 demo $(DEMO_ARGS)

# Two processes, which take files in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	@$(PYTEST) $(TWO) -m "not trainer" $(PYTEST_ARGS)

test: $(STAMP)
	@$(PYTEST) $(TWO) $(PYTEST_ARGS)

test-demo: $(STAMP)
	@MOLMO2_FULL_DEMO=1 $(PYTEST) tests/nemo/test_demo.py $(PYTEST_ARGS)

test-slurm: $(STAMP)
	@MOLMO2_SLURM_TESTS=1 $(PYTEST) -rs tests/launch/slurm $(PYTEST_ARGS)

container-test: $(STAMP)
	@PYTHON=$(BIN)/python tests/container/build_and_run.sh

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/hadolint --failure-threshold warning Dockerfile && $(BIN)/shellcheck .ci/run tests/container/*.sh

# transformers with Molmo2 of its own does not go together with NeMo 2.7: a second environment.
fixtures: .venv-fixtures/.installed
	@.venv-fixtures/bin/python tests/fixtures/make_fixtures.py
	@.venv-fixtures/bin/python tests/fixtures/make_processor_fixtures.py

.venv-fixtures/.installed: requirements/fixtures.txt
	@test -n "$(PYTHON)" || { echo "molmo2: python3.11 not found; call make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x .venv-fixtures/bin/python || $(PYTHON) -m venv .venv-fixtures
	@.venv-fixtures/bin/python -m pip --disable-pip-version-check install -qq -r requirements/fixtures.txt
	@touch $@

clean:
	@rm -rf demo runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache lightning_logs nemo_experiments
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
