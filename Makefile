# Every target is for a bare Debian 12 as root; `setup` installs what is missing and is quick after.
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup run test lint type bench clean

help:
	@echo "make run    a node on this machine, the demo's table, then the node until Ctrl-C"
	@echo "make test   lint, types and every test"
	@echo "make setup | lint | type | bench | clean"

setup:
	@scripts/setup.sh

run: setup
	$(BIN)/tessera up --demo

test:
	@scripts/setup.sh test
	@$(MAKE) --no-print-directory lint type
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find proto/tessera_wire \( -name '*_pb2*.py' -o -name '*_pb2*.pyi' -o -name .generated \) -delete
	rm -f datapath/bpf/tessera.o
