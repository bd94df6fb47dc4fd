# Each target creates what it needs: a virtual environment in .venv with the package and its extras.
PYTHON ?= python3
BIN := .venv/bin
RUNS := runs

.PHONY: help train test soak check format bench bench-elastic trial clean

help:
	@echo "make train   train on the embedded digits with a growing batch, on one worker and then two, and with plain decay"
	@echo "make test    run every check and test"
	@echo "make soak    run the long trials of the test suite"
	@echo "make check   run formatting, lint, type and layer checks only"
	@echo "make format  format the code"
	@echo "make bench   run the benchmarks of docs/benchmarks.md (about 90 minutes)"
	@echo "make bench-elastic  measure how long training stands still when workers come, go and die, and what a coordinator costs (about 15 minutes)"
	@echo "make trial   compare three strategies on Fashion-MNIST, three seeds each (at most an hour, resumable)"
	@echo "make clean   remove the virtual environment, runs and caches"

train: .venv/train
	$(BIN)/elastic-batch plan digits --workers 1,2,4
	$(BIN)/elastic-batch train digits --workers 1:2 --run-dir $(RUNS)/digits --resume auto
	$(BIN)/elastic-batch train digits --strategy decay-lr --run-dir $(RUNS)/digits-decay-lr --resume auto
	$(BIN)/elastic-batch report $(RUNS)/digits $(RUNS)/digits-decay-lr --output $(RUNS)/report

test: check
	$(BIN)/pytest -m "not soak and not alone" -n 2 --dist loadfile
	$(BIN)/pytest -m "not soak and alone"

soak: .venv/test
	$(BIN)/pytest -m soak

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/test
	for name in update heap noise ghost stream checkpoint data; do $(BIN)/python benchmarks/bench_$$name.py || exit 1; done

bench-elastic: .venv/test
	for name in elastic session coordinator; do PYTHONPATH=tests $(BIN)/python benchmarks/bench_$$name.py || exit 1; done

trial: .venv/train
	$(BIN)/python benchmarks/trial_fashion_mnist.py

clean:
	rm -rf .venv $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/train: setup.cfg
	@echo "Installing the package and what the example needs into .venv (torch is several GB; a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[train]'
	touch $@

.venv/test: setup.cfg
	@echo "Installing the package, its extras and the test tools into .venv (torch is several GB; a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@
