# Each target first creates .venv if it is missing or older than requirements.txt.
# PYTHON=python3.12 chooses the Python for .venv. This file works with GNU make 3.81 (macOS).

.PHONY: help setup repro page test lint docs bench lock

help:
	@echo "make setup     install the locked packages into .venv (the other targets run this if needed)"
	@echo "               GPU=cuda13 selects MLX for NVIDIA GPUs on Linux, GPU= selects the CPU again"
	@echo "make repro     check the outputs recorded in dvc.lock, then update every result"
	@echo "make page      write page.html, a page to draw digits on, with the model inside"
	@echo "make test      run the tests"
	@echo "make lint      check style, format and types"
	@echo "make docs      write the results into README and docs/, also the pictures"
	@echo "make bench     time training against PyTorch, JAX and plain MLX, and time the pipeline"
	@echo "make lock      update the locked package versions from pyproject.toml"

# Otherwise `python -m stages.train` would not find the folder of the project.
export PYTHONSAFEPATH :=

# All locked packages have wheels for these Python versions.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
IN_PYTHON = $(if $(PYTHON), in $(PYTHON))
# MLX's build in .venv: cuda13, or empty for the CPU. GPU=... on the command line selects it.
# Otherwise each target keeps the installed build, even when it recreates .venv.
INSTALLED_GPU := $(shell cat .venv/gpu 2>/dev/null)
CHOSEN_GPU := $(if $(filter command,$(origin GPU)),$(GPU),$(INSTALLED_GPU))
ifneq ($(filter $(CHOSEN_GPU),cuda13),$(CHOSEN_GPU))
$(error GPU is $(CHOSEN_GPU), must be cuda13 or empty; run `make setup GPU=cuda13` or `make setup GPU=`)
endif
ifneq ($(CHOSEN_GPU),$(INSTALLED_GPU))
.PHONY: .venv/installed
endif
REQUIREMENTS := requirements$(CHOSEN_GPU:%=-%).txt
# No bytecode: on a full disk Python would write a truncated file, and fail at it later. DVC runs
# commands with SHELL, which is /usr/sbin/nologin in some service accounts. The script `dvc` names
# the place where .venv was made, and a clone can move.
IN_VENV := PYTHONDONTWRITEBYTECODE=1 SHELL=/bin/sh PATH="$$PWD/.venv/bin:$$PATH"
# uv ignores pip's settings, such as a company's index. Where pip has some, it installs everything.
PIP_INSTALL := -m pip install --no-user --quiet --disable-pip-version-check --require-hashes
# Bytecode is compiled here. Where PYTHONDONTWRITEBYTECODE is set, as in many containers, each dvc
# command would compile it again, which takes 0.6 s.
INSTALL := install() { \
	if .venv/bin/python -m pip config list | \
	grep -E '(index|url|links|proxy|cert|host)=..{2}' > /dev/null; \
	then .venv/bin/python $(PIP_INSTALL) "$$@"; \
	else .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python \
	--require-hashes "$$@"; fi; }; install

# A file from another machine can have a time in the future. Take that time over, because otherwise
# each call would install the packages.
TOUCH = @touch $@; for file in $^; do if [ "$$file" -nt $@ ]; then touch -r "$$file" $@; fi; done

setup: .venv/installed
	@$(IN_VENV) python -m tools.verify

# DVC does not reread files that it has written, so verify them first.
repro: .venv/installed
	@$(IN_VENV) python -m tools.verify
	@$(IN_VENV) python -m dvc repro || { $(IN_VENV) python -m tools.verify --disk-space; exit 1; }
	@$(IN_VENV) python -m tools.compare --last-run

page: repro
	.venv/bin/python -m tools.page

test: .venv/installed
	PYTHONUTF8=1 .venv/bin/python -m pytest -n 2 --dist worksteal

lint: .venv/lint-installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --platform linux
	.venv/bin/mypy --platform darwin

# The tests of the documents run their commands. UPDATE_DOCS lets them write what is printed.
docs: repro
	@$(INSTALL) -r .ci/search.txt
	PYTHONPATH=. .venv/bin/python docs/pictures/draw.py
	UPDATE_DOCS=1 PYTHONUTF8=1 .venv/bin/python -m pytest -n 2 --dist loadfile -m '' tests/docs

bench: .venv/bench/installed repro
	.venv/bin/python -m bench.run .venv/bench/bin/python
	.venv/bin/python -m bench.pipeline

lock: .venv/installed
	$(LOCK) --output-file stages/requirements.txt pyproject.toml --group cpu
	$(LOCK) --output-file requirements.txt pyproject.toml --group cpu --group run \
		--constraint stages/requirements.txt
	$(LOCK) --output-file requirements-cuda13.txt pyproject.toml --group cuda13 --group run \
		--constraint requirements.txt
	$(LOCK) --output-file .ci/requirements.txt --group lint --constraint requirements.txt
	$(LOCK) --output-file .ci/uv.txt --group install
	[ ! -d bench ] || $(LOCK) --output-file bench/requirements.txt --group bench \
		--constraint requirements.txt
	$(LOCK) --output-file .ci/mpi.txt --group mpi
	$(LOCK) --output-file .ci/remotes.txt --group remotes --constraint requirements.txt
	$(LOCK) --output-file .ci/search.txt --group search --constraint requirements.txt
LOCK := .venv/bin/uv pip compile --quiet --upgrade --universal --fork-strategy fewest \
	--generate-hashes --no-annotate --custom-compile-command "make lock"

.venv/installed: $(REQUIREMENTS) .ci/uv.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo >&2 "error: no Python 3.11 to 3.14$(IN_PYTHON); install one (apt install python3" \
		"python3-venv, brew install python@3.14) or name one: make PYTHON=/path/to/python3"; \
		exit 1; }
	@case "$$("$(PYTHON)" -c 'import platform as p; print(p.system(), p.machine())')" in \
		"Linux x86_64" | "Linux aarch64" | "Darwin arm64") ;; \
		*) echo >&2 "error: this project does not run on this machine, only on Linux on x86-64 and" \
		"arm64 and on macOS on Apple silicon (with an arm64 Python); on Windows use WSL 2 with" \
		"Ubuntu 22.04 or newer"; exit 1 ;; esac
	@case "$$PWD" in *[:\"\$$\`\\]*) \
		printf >&2 'error: %s: Python cannot work in a folder with %s in its name; rename it\n' \
		"$$PWD" ": \" \$$ \` or \\"; exit 1 ;; esac
	@echo "Installing the packages of $(REQUIREMENTS) into .venv"
	@rm -f $@  # an interrupted installation must not look finished
	@"$(PYTHON)" -m venv --clear .venv; status=$$?; echo "$(CHOSEN_GPU)" > .venv/gpu; exit $$status
	@.venv/bin/python $(PIP_INSTALL) -r .ci/uv.txt
	@$(INSTALL) -r $(REQUIREMENTS)
	@.venv/bin/python -m tools.openblas
	@.venv/bin/python -c "import vl_convert as vl; print(vl.javascript_bundle(vl_version='5.21'))" \
		> .venv/vega.js  # for .dvc/plots.html
	$(TOUCH)

.ci/%.txt:
	@[ -e $@ ] || { echo >&2 "error: $@: not found; copy the hidden files, too:" \
		"cp -r PROJECT/. COPY, or git clone"; exit 1; }

.venv/lint-installed: .ci/requirements.txt .venv/installed
	@$(INSTALL) -r .ci/requirements.txt
	$(TOUCH)

.venv/bench/installed: bench/requirements.txt .venv/installed
	.venv/bin/python -m venv --clear .venv/bench
	.venv/bench/bin/python $(PIP_INSTALL) -r $<
	$(TOUCH)
