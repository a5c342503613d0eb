# Two commands set everything up: `make demo` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# For `make bench`: a prepared set to train on (the results that are kept are of CIFAR-10), a folder of image files to
# prepare, and a seed for the trainings whose quality is compared, which adds them to those with other seeds.
DATA ?= demo/data
IMAGES ?=
SEED ?= 0
# The tests run in as many processes as there are processors, at most eight, of one thread each.
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-long test-gpu faults mutants lint bench bench-gpu gpu-check gpu-wheels samplers clean

demo: $(READY)
	$(BIN)/diffkit demo

test: $(READY)
	$(PYTEST)

# With what takes minutes, or a C++ compiler.
test-long: $(READY)
	DIFFKIT_LONG=1 $(PYTEST)

# The long fault campaign, about an hour on two cores: benchmarks/results/faults.json.
faults: $(READY)
	$(BIN)/python benchmarks/faults.py

# The code that everything durable passes through, changed on purpose: which changes no test notices.
mutants: $(READY)
	$(BIN)/python benchmarks/mutants.py

# On a machine with a GPU.
test-gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/prepare.py $(IMAGES)
	$(BIN)/python benchmarks/intervals.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py
	test -d demo/run || $(BIN)/diffkit demo -o demo
	$(BIN)/python benchmarks/defaults.py demo/run
	$(BIN)/python benchmarks/costs.py $(DATA)
	$(BIN)/python benchmarks/ranks.py $(DATA)
	$(BIN)/python benchmarks/sums.py
	$(BIN)/python benchmarks/host_time.py
	$(BIN)/python benchmarks/gpu_bytes.py
	$(BIN)/python benchmarks/beside.py $(DATA)
	$(BIN)/python benchmarks/backbones.py $(DATA)
	$(BIN)/python benchmarks/quality.py $(DATA) --seed $(SEED)

# On a machine with a GPU, by a Python that has torch. WHEELS: a folder that `make gpu-wheels` has filled elsewhere, for
# a machine without a package index; else `pip install '.[bench,demo]'` and, without dependencies, k-diffusion first.
GPU_PYTHON ?= $(PYTHON)
WHEELS ?=

# Is all right there, and how fast? Less than ten minutes; ONLY=graphs,profile for some of it.
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(if $(ONLY),--only $(ONLY))

# LEG: demo, training, sampling, costs, backbones or quality, by default all of them; the last three train on DATA, a set
# prepared at 128x128. What a call that was cut off had measured is not measured again.
bench-gpu:
	$(GPU_PYTHON) benchmarks/gpu_bench.py $(if $(LEG),--leg $(LEG)) $(if $(filter-out demo/data,$(DATA)),--data $(DATA)) $(if $(WHEELS),--wheels $(WHEELS))

# All wheels for both, but torch, into WHEELS, by default ./wheels; FOR=check: for gpu-check only. TORCH: the version there.
TORCH ?= 2.11.0
gpu-wheels: $(READY)
	$(BIN)/python benchmarks/gpu_wheels.py $(or $(WHEELS),wheels) --torch $(TORCH) $(if $(FOR),--for $(FOR))

# The tables and the plot of docs/samplers.md, on the demo's model.
samplers: $(READY)
	test -d demo/run || $(BIN)/diffkit demo -o demo
	$(BIN)/python benchmarks/samplers.py demo/run

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion
	touch $(READY)

clean:
	rm -rf .venv
