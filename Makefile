# Two commands set everything up: `make demo` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-long lint bench samplers clean

demo: $(READY)
	$(BIN)/diffkit demo

test: $(READY)
	$(BIN)/python -m pytest -q

# With what takes minutes, or a C++ compiler.
test-long: $(READY)
	DIFFKIT_LONG=1 $(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/intervals.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py

# The tables and the plot of docs/samplers.md, on the demo's model.
samplers: $(READY)
	test -d demo/run || $(BIN)/diffkit demo -o demo
	$(BIN)/python benchmarks/samplers.py demo/run
	$(BIN)/python benchmarks/defaults.py demo/run

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion
	touch $(READY)

clean:
	rm -rf .venv
