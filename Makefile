# Development commands that work in a fresh checkout; they need only Python 3.10+, a C++ compiler and make.
# Set-up (.venv, pinned packages, the native module) is automatic and is skipped if it is up to date.

PYTHON ?= python3
ARGS ?=
# Test files run in parallel, each file in one process, so that its tests share what they compile.
WORKERS ?= 2
# The CUDA kernels take most of the build time, so they are built only with FLMOE_CUDA=1.
export FLMOE_CUDA ?= 0

VENV := .venv
# The environment of `make compatibility`, and its packages.
OTHER := build/compatibility
# The environment of `make docs`, which needs neither torch nor the native module.
DOCS := build/docs
PACKAGES ?= torch
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# Stamps are written last, so an interrupted set-up leaves none and starts again.
INSTALLED := $(VENV)/.stamp-installed
TOOLS := $(VENV)/.stamp-tools
BUILT := $(VENV)/.stamp-built
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt flmoe_kernels/_version.py \
	$(shell find csrc 2>/dev/null)
CPP_SOURCES := $(shell find csrc tests/native -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A stamp is valid only if the environment runs, was not moved, and has the module.
ifneq ($(shell $(PY) -c '' 2>/dev/null && cat $(INSTALLED) 2>/dev/null),$(shell pwd -P))
$(INSTALLED): FORCE
endif
ifeq ($(wildcard flmoe_kernels/_native*.so),)
$(BUILT): FORCE
endif
# It is not valid if the module was built with another value of FLMOE_CUDA.
CUDA_CHOICE := FLMOE_CUDA=$(FLMOE_CUDA)
ifneq ($(shell cat $(BUILT) 2>/dev/null),$(CUDA_CHOICE))
$(BUILT): FORCE
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pip processes must not write to the same environment at once
.PHONY: FORCE help compiler setup demo test test-all test-aarch64 test-integrations aarch64-tools compatibility bench docs lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\): .*## /\1\t/p' Makefile | expand -t 15
	@echo "PYTHON=python3.12 make setup   uses that Python"
	@echo "FLMOE_CUDA=1 make setup        builds the CUDA kernels too"
	@echo "ARGS=... is appended to the command, WORKERS=... is the number of test files at a time."

# Checked before anything is downloaded.
compiler:
	@$(check_compiler)

setup: compiler $(BUILT) $(TOOLS) ## make .venv and build the native module

demo: compiler $(BUILT) ## run the demo on real data
	$(PY) -m examples.digits $(ARGS)

GATE = $(PY) -m pytest bench/ --gate bench/floors.toml -q
PYTEST = $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile

test: compiler $(BUILT) $(TOOLS) ## run the tests of all operators and backends: minutes
	$(PYTEST) -m "not slow" $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -m "not slow" $(ARGS)

test-all: compiler $(BUILT) $(TOOLS) ## run all tests, including the exhaustive and slow ones: half an hour
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter $(ARGS)

# The packages are added to .venv; they need Python 3.11 or newer.
test-integrations: compiler $(BUILT) $(TOOLS) ## install transformers, Lightning and accelerate (107 MB) and test with them
	$(PIP) install -r requirements/integrations.txt
	$(PYTEST) tests/integrations $(ARGS)
	$(PYTEST) tests/test_documentation.py -k integrations.md

# The driver runs the C++ kernels alone, because Python and torch are slow under emulation. Its results are compared with
# those of this machine's processor, which the Python tests compare with the reference.
test-aarch64: compiler aarch64-tools $(INSTALLED) ## cross-compile the CPU kernels and test them under qemu: minutes
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -G Ninja -S . -B build/driver -DFLMOE_DRIVER=ON
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -G Ninja -S . -B build/aarch64 -DFLMOE_DRIVER=ON \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(VENV)/bin/cmake --build build/driver
	$(VENV)/bin/cmake --build build/aarch64
	build/driver/driver record build/driver/results
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/driver compare build/driver/results

aarch64-tools:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
		command -v $$tool > /dev/null || { echo "make: $$tool was not found: install the cross compiler\
 and the emulator (Debian/Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user)" >&2; exit 1; }; \
	done

compatibility: compiler ## test operators, compile, export, backends with PACKAGES="torch==2.6.0"
	@$(check_python)
	rm -rf $(OTHER) && "$(PYTHON)" -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet $(filter-out triton%,$(PACKAGES)) pytest --editable .
	$(if $(filter triton%,$(PACKAGES)),$(OTHER)/bin/python -m pip install --quiet --upgrade --no-deps $(filter triton%,$(PACKAGES)))
	status=0; \
	$(OTHER)/bin/python -m pytest --junitxml=$(OTHER)/1.xml tests/ops/test_every_operator.py tests/core/test_backend.py \
		tests/core/test_compile.py tests/core/test_dynamic_sizes.py tests/layers/test_layer_programs.py $(ARGS) || status=1; \
	$(if $(filter triton%,$(PACKAGES)),TRITON_INTERPRET=1 $(OTHER)/bin/python -m pytest --junitxml=$(OTHER)/2.xml \
		tests/interpreter -m "not slow" $(ARGS) || status=1;) \
	$(OTHER)/bin/python -m bench.compatibility $(OTHER)/1.xml $(OTHER)/2.xml; \
	exit $$status

bench: compiler $(BUILT) $(TOOLS) ## run the quick benchmarks, fail on a regression in two processes
	$(GATE) $(ARGS) || $(GATE) --last-failed $(ARGS)

# The pages may load nothing from other hosts.
docs: $(DOCS)/.stamp ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@! grep -rE --include='*.html' '<(script|link|img)[^>]* (src|href)="https?:' build/site

$(DOCS)/.stamp: requirements/docs.txt
	@$(check_python)
	rm -rf $(DOCS) && "$(PYTHON)" -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@touch $@

lint: $(TOOLS) ## check style and types, change nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(TOOLS) ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

clean: ## remove the environment, builds, results and caches
	rm -rf $(VENV) build dist *.egg-info demo_out .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis .benchmarks flmoe_kernels/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without a valid stamp the state of the environment is unknown, so it is created again. With a valid
# stamp only the requirements changed, and pip updates the environment.
$(INSTALLED): requirements/demo.txt
	@$(check_python)
	@if [ "$$($(PY) -c '' 2>/dev/null && cat $(INSTALLED) 2>/dev/null)" != "$$(pwd -P)" ]; then \
		echo "Creating $(VENV) and installing pinned packages. This happens once and takes minutes."; \
		rm -rf $(VENV) && "$(PYTHON)" -m venv $(VENV); \
	fi
	@rm -f $(INSTALLED) $(TOOLS) $(BUILT)
	$(PIP) install -r requirements/demo.txt
	@pwd -P > $(INSTALLED)

# Packages that only tests and linting use; the demo does not need them.
$(TOOLS): $(INSTALLED) requirements/dev.txt
	@rm -f $(TOOLS)
	$(PIP) install -r requirements/dev.txt
	@touch $(TOOLS)

$(BUILT): $(INSTALLED) $(BUILD_INPUTS)
	@rm -f $(BUILT)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -c '$(say_cuda)'
	@echo '$(CUDA_CHOICE)' > $(BUILT)

# Prints which CUDA kernels were built, because pip hides the log of the build.
define say_cuda
from flmoe_kernels import _native; \
built, reason = _native.cuda_build(); \
print("CUDA kernels:", built or f"not built ({reason})")
endef

define check_python
say() { echo "make: $$1" >&2; exit 1; }; \
command -v "$(PYTHON)" >/dev/null || say "$(PYTHON) was not found: install Python 3.10 or newer\
 (Debian/Ubuntu: apt-get install python3 python3-venv), or run make PYTHON=/path/to/python"; \
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || say "$(PYTHON) is older than\
 3.10: install a newer Python, or run make PYTHON=/path/to/python"; \
"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || say "$(PYTHON) cannot create virtual\
 environments: install its venv module (Debian/Ubuntu: apt-get install python3-venv)"
endef

define check_compiler
for compiler in "$${CXX%% *}" c++ g++ clang++; do \
	command -v "$$compiler" >/dev/null && exit 0; \
done; \
echo "make: no C++ compiler was found: install GCC 11+ or Clang 14+ (Debian/Ubuntu: apt-get install\
 g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)" >&2; exit 1
endef
