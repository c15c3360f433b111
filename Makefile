# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-security test-deploy check lint types imports docs-run clean

demo: .venv/ready
	$(BIN)/warmfed run

test: .venv/ready
	$(BIN)/pytest -n 2 -q

# attacks on a real SuperLink and SuperNodes, as processes
test-security: .venv/ready
	$(BIN)/pytest -q tests_deploy/test_security.py

# a real deployment: the guide word for word, and equal bytes; takes minutes
test-deploy: .venv/flower
	$(BIN)/pytest -q tests_deploy tests/transports/test_flower.py tests/deploy/test_ray_simulation.py tests/algorithms/shared/test_robust_aggregation.py

check: lint types imports test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

imports: .venv/ready
	$(BIN)/lint-imports

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "warmfed needs Python 3.11 or newer; name one: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,flower]'
	touch $@

.venv/flower: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,flower,simulation]'
	touch $@

clean:
	rm -rf .venv runs
