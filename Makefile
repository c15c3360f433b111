# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The build of torch: `cpu` has no CUDA and is several gigabytes smaller; `default` is the one on PyPI.
TORCH_BUILD ?= $(shell if [ "$$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then echo default; else echo cpu; fi)
TORCH_CPU := $(shell grep '^torch==' constraints.txt)+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
WHEEL := build/wheel-test
PAGES := build/pages
# Settings of a run of WarmFed that takes seconds.
TINY := generator.steps=2 generator.training.epochs=1 algorithm.local.epochs=1 algorithm.personal.epochs=1 \
	$(addprefix algorithm.synthesis.,per_class=6 subset=40 training.epochs=2 filter_training.epochs=1)
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

# Test files that need a few seconds each; `make test` runs the others too.
FAST_TESTS := $(patsubst %,tests/%.py,test_config test_fit test_run algorithms/test_identities core/test_messages \
	core/test_tensors data/test_federation runs/test_golden runs/test_progress tasks/test_classification utils/test_errors)

# $(call install_torch,PYTHON): the CPU build, from pip's configured sources if they have it, else from torch's own index
define install_torch
	@test $(TORCH_BUILD) != cpu \
	|| $(1) $(PIP_INSTALL) --no-deps '$(TORCH_CPU)' 2>/dev/null \
	|| $(1) $(PIP_INSTALL) --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH_CPU)' \
	|| { echo 'No CPU build of torch for this Python was found. `make TORCH_BUILD=default` installs the build on PyPI.'; exit 1; }
endef

.PHONY: demo test test-fast test-security test-deploy wheel-test check format lint types imports docs clean

demo: .venv/ready
	$(BIN)/warmfed run

test: .venv/ready
	$(BIN)/pytest -n 2 -q

# the inner loop: under a minute on two cores
test-fast: .venv/ready
	$(BIN)/pytest -n 2 -q $(FAST_TESTS)

# attacks on a real SuperLink and SuperNodes, as processes
test-security: .venv/ready
	$(BIN)/pytest -q tests_deploy/test_security.py

# a real deployment: the guide word for word, and equal bytes; takes minutes
test-deploy: .venv/flower
	$(BIN)/pytest -q tests_deploy tests/transports/test_flower.py tests/deploy/test_ray_simulation.py tests/algorithms/shared/test_robust_aggregation.py

# the built wheel in a fresh environment without development tools: the command line, and a tiny run of WarmFed
wheel-test: .venv/ready
	rm -rf $(WHEEL)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	$(BIN)/python -m venv $(WHEEL)/env
	$(call install_torch,$(WHEEL)/env/bin/python)
	$(WHEEL)/env/bin/python $(PIP_INSTALL) $(WHEEL)/warmfed-*.whl
	cd $(WHEEL) && env/bin/warmfed --help >help.txt
	cd $(WHEEL) && env/bin/warmfed run --rounds 1 --out run --set $(TINY)
	rm -rf $(WHEEL)

check: lint types imports test

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

imports: .venv/ready
	$(BIN)/lint-imports

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "warmfed needs Python 3.11 or newer; name one: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install_torch,$(BIN)/python)
	$(BIN)/python $(PIP_INSTALL) -e '.[dev,flower]'
	touch $@

.venv/flower: .venv/ready
	$(BIN)/python $(PIP_INSTALL) -e '.[dev,flower,simulation]'
	touch $@

# the documentation as pages that need no network, in site/; a broken link is an error
docs: .venv/docs
	rm -rf $(PAGES)
	mkdir -p $(PAGES)
	git ls-files '*.md' CITATION.cff LICENSE docs benchmarks examples 'src/*.py' ':!src/*.md' | tar -cf - -T - | tar -xf - -C $(PAGES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.venv/docs: .venv/ready
	$(BIN)/python $(PIP_INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf .venv runs build site
