# Needs Python 3.11 or newer, and nothing else of ours: everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test check format clean

# glibc's allocator returns large buffers to the system and asks for them again in every step; keeping them makes a
# training step on the CPU a fifth faster. Other allocators ignore the two settings.
study: export MALLOC_MMAP_THRESHOLD_ = 1073741824
study: export MALLOC_TRIM_THRESHOLD_ = 2147483648
study: .venv/.installed
	$(BIN)/normfree study relu-revival --preset cpu

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

check: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "normfree needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
