# make repro   bring every result up to date
# make verify  repro, after damage: DVC trusts no file that it has not read again
# make test    run the tests
# make lint    check style, format and types
# make bench   time the train loop against PyTorch, JAX and MLX as it comes
# make lock    renew the locked versions from pyproject.toml
# Each sets up .venv first if it is missing. PYTHON=python3.12 chooses the Python for it.

.PHONY: repro verify test lint bench lock

# The Pythons that the locked packages have wheels for.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
IN_PYTHON = $(if $(PYTHON), in $(PYTHON))
DVC := PATH="$(CURDIR)/.venv/bin:$$PATH" dvc
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes

repro: .venv/installed
	$(DVC) repro

# DVC reads a file again when it is newer, one of its cache also when it may be written. A swapped
# list of the files in data/raw takes --force.
verify: .venv/installed
	cache="$$($(DVC) cache dir)" && mkdir -p "$$cache" && \
		find "$$cache" data -type f -exec touch {} + -exec chmod u+w {} +
	$(DVC) repro || $(DVC) repro --force

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/lint-installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv/bench/installed repro
	.venv/bin/python -m tests.bench.run .venv/bench/bin/python

lock: .venv/lint-installed
	.venv/bin/uv pip compile $(LOCK) --output-file requirements.txt pyproject.toml
	.venv/bin/uv pip compile $(LOCK) --output-file .ci/requirements.txt --group lint \
		--constraint requirements.txt
LOCK := --quiet --upgrade --universal --fork-strategy fewest --generate-hashes --no-annotate \
	--custom-compile-command "make lock"

.venv/installed: requirements.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo >&2 "error: no Python 3.11 to 3.14$(IN_PYTHON); install one (apt install python3" \
		"python3-venv, brew install python@3.14) or name one: make PYTHON=/path/to/python3"; \
		exit 1; }
	@case "$$("$(PYTHON)" -c 'import platform as p; print(p.system(), p.machine())')" in \
		"Linux x86_64" | "Linux aarch64" | "Darwin arm64") ;; \
		*) echo >&2 "error: MLX has no package for this machine, only for Linux on x86-64 and" \
		"arm64 and for macOS on Apple silicon (with an arm64 Python)"; exit 1 ;; esac
	@echo "Installing the packages of requirements.txt into .venv, which takes a minute or two"
	"$(PYTHON)" -m venv --clear .venv
	$(PIP_INSTALL) -r requirements.txt
	.venv/bin/python -m stages.blas
	.venv/bin/python -c "import vl_convert as vl; print(vl.javascript_bundle(vl_version='5.21'))" \
		> .venv/vega.js  # for .dvc/plots.html
	@touch $@

.venv/lint-installed: .ci/requirements.txt .venv/installed
	$(PIP_INSTALL) -r .ci/requirements.txt
	@touch $@

.venv/bench/installed: tests/bench/requirements.txt .venv/installed
	.venv/bin/python -m venv --clear .venv/bench
	.venv/bench/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
