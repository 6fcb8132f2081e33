# Two commands: `make train` trains a small model on real text, `make test` runs every check.
# Both make .venv if need be.
PYTHON ?= python3
RANKS ?= 4
VENV := .venv
BIN := $(VENV)/bin
NAME := $(shell date +train-%Y%m%d-%H%M%S)
ARGS ?=

export OMP_NUM_THREADS ?= 1
# Every process that a test starts would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test quick lint mutants reliability pictures clean

train: $(VENV)/installed
	$(BIN)/vp-train parallel.pp=$(RANKS) run.name=$(NAME) $(ARGS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 3 --dist loadfile

# All but the slow tests.
quick: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Do the tests fail when the code is wrong?
# make mutants ARGS="--packages schedules --count 20 --seed 2"
mutants: $(VENV)/installed
	$(BIN)/python -m tests.mutants $(ARGS)

# Faults at random moments and random layouts, the long form; minutes to hours.
# make reliability ARGS="crafted --json crafted.json"
reliability: $(VENV)/installed
	$(BIN)/python -m tests.reliability $(ARGS)

# The pictures of README and docs/schedules.md, by the commands that docs/schedules.md shows, and
# the frontier from its file of results; about a minute.
pictures: $(VENV)/installed
	$(BIN)/vp-simulate --out build/pictures
	$(BIN)/vp-simulate --compare 1f1b,interleaved,interlaced,zb_h1,zb_v,v_half,v_min \
	    --vocab none,one_barrier --out build/pictures \
	    parallel.pp=8 num_microbatches=64 cost=a100_4b run.dtype=float16
	cp build/pictures/schedule.svg build/pictures/comparison.png benchmarks/results/
	$(BIN)/python benchmarks/frontier.py --drawn benchmarks/results/frontier.json \
	    --picture benchmarks/results/frontier.png

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; found = sys.version_info[:2]; sys.exit(found < (3, 11) and \
	  "$(PYTHON) is Python %d.%d, and vp_train needs 3.11 or later: make PYTHON=python3.12 ..." % found)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
