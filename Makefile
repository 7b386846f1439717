# venv  the pinned environment, in .venv            demo   the three stages on a laptop CPU, from real pictures and video
# test-fast  the tests that start no trainer        test   all but the thorough ones, the demo and Slurm's
# test-thorough  test, and what repeats its equalities on more layouts and more cases
# test-demo  the demo, checked                      lint   ruff and mypy
# test-slurm  the pipeline on a real Slurm, started here (minutes; as root, needs slurmctld, slurmd, munge)
# test-stack  every layout, checkpoint, conversion and the tiny pipeline once: what another version could break
# test-stack-short  of these the ones that meet most of a version's interfaces, a sixth of the time
# test-matrix  test-stack for every Python, Megatron-core, torch and numpy that is tried, and between them (an hour)
# container-test  build the Dockerfile with buildah and run the tiny demo inside (see docs/container.md)
# test-transformers  fine-tunes, base models and exports beside transformers 5, in .venv-fixtures (made here)
# test-frameworks  an export's answers in lmms-eval, in .venv-frameworks (made here; 3 GB), and in VLMEvalKit if it is there
# gpu-kit  dist/gpu-kit: all that a GPU machine without a network needs for the checks of gpu-check (docs/gpu.md)
# gpu-check  where there is a card: tests/gpu, 4B steps, kernels, profile, memory; at most 10 minutes, one page of results
# test-gpu-kit  the kit, unpacked and run on the CPU at tiny sizes, beside such a machine's versions (installed here)
# soak  runs killed, damaged and denied room at random, against an undisturbed one, for SOAK_ARGS='--minutes 60 --seed 0'
# fixtures  regenerate tests/fixtures               clean  remove what the other targets made (not .venv)
#
# PYTHON=python3.12 chooses the Python, VENV=.venv-3.12 another folder for its environment.

SHELL := /bin/bash
# the first that runs: a name on the PATH may be that of a Python that is not there (pyenv)
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '' 2> /dev/null && command -v $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
DEMO_ARGS ?=

# A Python that is asked for must be that of the environment, if there is one; without PYTHON=, the environment's is good.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(BIN)/python),)
LINE := -c 'import sys; print(*sys.version_info[:2], sep=".")'
ifneq ($(shell $(BIN)/python $(LINE)),$(shell $(PYTHON) $(LINE)))
$(error molmo2: $(VENV) was made with Python $(shell $(BIN)/python $(LINE)), $(PYTHON) is Python $(shell $(PYTHON) $(LINE)); remove $(VENV), or call make VENV=.venv-other PYTHON=$(PYTHON))
endif
endif
endif

.PHONY: venv demo test-fast test test-thorough test-demo test-slurm test-stack test-stack-short test-matrix test-transformers test-frameworks container-test gpu-kit gpu-check test-gpu-kit soak lint fixtures clean
.DEFAULT_GOAL := demo

venv: $(STAMP)

# --no-deps: the pins are complete, and NeMo's metadata asks for packages that a CPU run does not need.
$(STAMP): requirements/cpu.txt requirements/dev.txt requirements/cuda_libraries.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "molmo2: no Python 3.11 or 3.12 found; install one (Debian/Ubuntu: apt install python3.11 python3.11-venv) or call make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "molmo2: the pins are for Python 3.11 and 3.12, $(PYTHON) is $$($(PYTHON) -V 2>&1); call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "molmo2: cannot make a virtual environment; install the venv module of that Python (Debian/Ubuntu: python3-venv, or such as python3.12-venv)" >&2; exit 2; }
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip -q || { echo "molmo2: $(VENV) has no pip; remove $(VENV), install the python3-venv of that Python, call make venv again" >&2; exit 2; }
	@echo "installing the pinned environment into $(VENV) (2.4 GB on Python 3.11, a few minutes the first time)"
	@$(PIP) install -qq --no-deps -r requirements/cpu.txt -r requirements/dev.txt || { echo "molmo2: pip could not install the pins, see above; docs/install.md lists the usual causes" >&2; exit 2; }
	@$(PIP) install -qq --no-deps --no-build-isolation -e . || { echo "molmo2: pip could not install the package, see above" >&2; exit 2; }
	@$(BIN)/python -c 'import torch' 2> /dev/null || ! grep -qs '^cuda.*13.0' $(VENV)/lib/python3*/site-packages/torch/version.py || { \
	    echo "the package index has no CPU build of torch for this Python; the CUDA build runs on the CPU too, with NVIDIA's libraries: adding them (2 GB to download, 3 GB on disk; to avoid that, name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL, remove $(VENV) and call make venv again)"; \
	    $(PIP) install -qq --no-deps -r requirements/cuda_libraries.txt || { echo "molmo2: pip could not install them, see above" >&2; exit 2; }; }
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

test-thorough: $(STAMP)
	@MOLMO2_THOROUGH=1 $(PYTEST) $(TWO) $(PYTEST_ARGS)

test-demo: $(STAMP)
	@MOLMO2_FULL_DEMO=1 $(PYTEST) tests/nemo/test_demo.py $(PYTEST_ARGS)

test-slurm: $(STAMP)
	@MOLMO2_SLURM_TESTS=1 $(PYTEST) -rs tests/launch/slurm $(PYTEST_ARGS)

# What could break with another Megatron-core, torch or numpy.
STACK_TESTS := $(addprefix tests/,nemo training convert model parallel attention fused virtual_gpu test_cpu.py test_compat.py test_differences.py)

test-stack: $(STAMP)
	@$(PYTEST) $(TWO) $(STACK_TESTS) $(PYTEST_ARGS)

# NeMo's trainer and its resume, layouts of the model, conversion, a CUDA build of torch on the virtual GPU.
SHORT_STACK_TESTS := $(addprefix tests/,nemo/test_resume.py nemo/test_registration.py convert/test_parity.py model/test_families.py \
    model/test_memory.py parallel/test_dynamic.py training/test_checkpoints.py training/test_precision.py \
    virtual_gpu/test_trainer.py test_compat.py test_differences.py)

test-stack-short: $(STAMP)
	@$(PYTEST) $(TWO) $(SHORT_STACK_TESTS) $(PYTEST_ARGS)

test-matrix: $(STAMP)
	@$(BIN)/python -m tests.versions.matrix --tests $(STACK_TESTS) $(MATRIX_ARGS)

soak: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(SOAK_ARGS)

container-test:
	@tests/container/build_and_run.sh

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/hadolint --failure-threshold warning Dockerfile && $(BIN)/shellcheck .ci/run tests/container/*.sh benchmarks/gpu/run.sh

# KIT_ARGS: other machines and sizes, see python -m benchmarks.gpu.build --help
gpu-kit: $(STAMP)
	@$(BIN)/python -m benchmarks.gpu.build $(KIT_ARGS)

# CHECK_ARGS: parts by name, --seconds, --out; see python -m benchmarks.gpu.run --list
gpu-check: $(STAMP)
	@$(BIN)/python -m benchmarks.gpu.run $(CHECK_ARGS)

# The kit that is there, or one that is built first; an environment with the packages of that machine.
KIT_VENV ?= .venv-gpu-kit
KIT_PYTHON ?= $(shell for p in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python; do $$p -c '' 2> /dev/null && echo $$p && break; done)
test-gpu-kit: $(KIT_VENV)/.installed $(if $(wildcard dist/gpu-kit/manifest.json),,gpu-kit)
	@MOLMO2_PYTHON=$(abspath $(KIT_VENV))/bin/python OUT=gpu-results dist/gpu-kit/run.sh --tiny --seconds 3600 $(CHECK_ARGS)

$(KIT_VENV)/.installed: benchmarks/gpu/machine.txt
	@test -x $(KIT_VENV)/bin/python || $(KIT_PYTHON) -m venv $(KIT_VENV) || { echo "molmo2: the kit is for Python 3.12; call make test-gpu-kit KIT_PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "installing what such a machine has into $(KIT_VENV) (3 GB to download)"
	@PIP_CONSTRAINT=/dev/null $(KIT_VENV)/bin/python -m pip --disable-pip-version-check install -qq -r benchmarks/gpu/machine.txt
	@touch $@

# transformers with Molmo2 of its own does not go together with NeMo 2.7: a second environment.
test-transformers: $(STAMP) .venv-fixtures/.installed
	@$(PYTEST) -rs tests/convert/test_transformers5.py tests/convert/test_remote_code.py $(PYTEST_ARGS)

# lmms-eval; VLMEvalKit too where MOLMO2_VLMEVALKIT and MOLMO2_VLMEVALKIT_PYTHON name it.
test-frameworks: $(STAMP) .venv-frameworks/.installed
	@$(PYTEST) -rs tests/adapters $(PYTEST_ARGS)

.venv-frameworks/.installed: requirements/frameworks.txt requirements/fixtures.txt
	@test -n "$(PYTHON)" || { echo "molmo2: python3.11 not found; call make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x .venv-frameworks/bin/python || $(PYTHON) -m venv .venv-frameworks
	@.venv-frameworks/bin/python -m pip --disable-pip-version-check install -qq -r requirements/frameworks.txt
	@touch $@

fixtures: .venv-fixtures/.installed
	@.venv-fixtures/bin/python tests/fixtures/make_fixtures.py
	@.venv-fixtures/bin/python tests/fixtures/make_processor_fixtures.py

.venv-fixtures/.installed: requirements/fixtures.txt
	@test -n "$(PYTHON)" || { echo "molmo2: python3.11 not found; call make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x .venv-fixtures/bin/python || $(PYTHON) -m venv .venv-fixtures
	@.venv-fixtures/bin/python -m pip --disable-pip-version-check install -qq -r requirements/fixtures.txt
	@touch $@

clean:
	@rm -rf demo runs build dist gpu-results *.egg-info .pytest_cache .mypy_cache .ruff_cache lightning_logs nemo_experiments
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './.venv*' -prune -exec rm -rf {} +
