# `make demo` scores real text with the bundled model, `make test` runs everything that must hold, `make docs` builds the
# documentation into build/site and fails on a broken link.
# Packages are installed without compiling all of their modules: Python compiles those that are imported, when they are.
# `make wheel` builds a wheel with the kernels compiled for common CPUs.
# With a CUDA card, `make gpu` checks and measures the kernels on it, with the Python that has a CUDA build of PyTorch.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs gpu check format wheel

demo: .venv/installed .venv/compiled
	$(BIN)/lightrm demo

test: check .venv/compiled
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu:
	$(PYTHON) -m benchmarks.gpu

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/typos

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: .venv/installed
	$(BIN)/python -m lightrm.kernels.cpu.ahead all
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .
	touch $@

.venv/installed-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[docs]'
	touch $@ .venv/installed

.venv/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed .venv/installed-docs

# The kernels of this CPU, compiled before they are first called. Without them numba compiles each when it is called.
.venv/compiled: $(wildcard lightrm/kernels/cpu/*.py) | .venv/installed
	-$(BIN)/python -m lightrm.kernels.cpu.ahead
	touch $@
