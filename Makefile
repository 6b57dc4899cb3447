# Each command makes .venv from nothing but Python and a network, once, and does its work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := $(addprefix bench-,augment files n_clusters recipe search sinkhorn sizes throughput)

# Passive waits: torch's and scikit-learn's threads do not fight over a busy machine's cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean page bench $(BENCHMARKS)

demo: $(VENV)/installed
	$(BIN)/python examples/plot_digits.py

# Two processes of a thread each: two of two would take half as long again on two cores.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# The page that notebooks link to, made anew from the docstrings.
page: $(VENV)/installed
	$(BIN)/python docs/make_page.py

bench: bench-throughput

$(BENCHMARKS): bench-%: $(VENV)/installed
	$(BIN)/pip install -q -e .[benchmark]
	$(BIN)/python benchmarks/$*.py

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
