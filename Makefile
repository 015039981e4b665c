# Each job makes its own environment in .venv, once, and rebuilds the libraries where a source has changed.
#   make demo       train a small SAIL-VL2-MoE on easy-vqa, test it, let it answer      (arguments: ARGS="...")
#   make test       the test suite                                                      (ARGS="-k norm")
#   make bench      the benchmarks: table, verdict, benchmarks/results/                 (ARGS="-k bf16")
#   make lint       ruff, mypy, clang-format      make format   apply ruff and clang-format
#   make sanitize   the CPU kernels under AddressSanitizer and UBSan, over the edge cases
#   make gpu-check  on a machine with an NVIDIA card, no network: contact, headlines, tests, sanitizers, benchmarks
#                   (ARGS="--budget 570 --only contact --out DIR"; --list names the stages; PYTHON=python3)
#   make gpu-bundle what such a machine needs, in one folder                            (ARGS="more wheels by name")
#   make build      the libraries and what the jobs need, nothing run
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# a test process for each core (ARGS=-n0: one for all); files stay whole, as several share what is costly to make, and
# a process that dies ends the run: replaced ones were seen to wait for ever
WORKERS := -n logical --maxprocesses 8 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# what a build prints that is worth a line: which libraries and why, each object, errors
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PIP_BUILD := $(PY) -m pip install --disable-pip-version-check --verbose --constraint constraints.txt
SHOW := | sed -unE 's/^ *(sail_ops: .*|\[[0-9]+\/[0-9]+\] .{0,90}|.*\b(error|Error)\b.*)/\1/p'
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
INSTALL_INPUTS := $(shell find csrc -type f) CMakeLists.txt setup.py build_backend.py pyproject.toml constraints.txt

.PHONY: demo test bench lint format sanitize gpu-check gpu-bundle build clean

demo: $(VENV)/.demo
	$(PY) -m training.demo $(ARGS)

test: $(VENV)/.dev
	$(PY) -m pytest $(WORKERS) $(ARGS)

bench: $(VENV)/.dev
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

sanitize: $(VENV)/.dev
	VENV=$(VENV) WORKERS="$(WORKERS)" tests/sanitize.sh $(ARGS)

gpu-check:  # with the python that has a CUDA build of torch: make gpu-check PYTHON=...
	$(PYTHON) tests/gpu/check.py $(ARGS)

gpu-bundle: $(VENV)/.dev
	PYTHON=$(PY) tests/gpu/bundle.sh $(ARGS)

build: $(VENV)/.dev

clean:
	rm -rf $(VENV) build sail_ops/*.so *.egg-info

# torch first and alone: later packages only ask for some torch, and what asks first decides which build comes
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable}: Python 3.11 or newer is needed (make PYTHON=...)")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(INSTALL_INPUTS)
	$(PIP_BUILD) --editable '.[train]' $(SHOW)
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(INSTALL_INPUTS)
	$(PIP_BUILD) --editable '.[train,bench,dev]' $(SHOW)
	$(PIP_INSTALL) --no-deps triton  # its interpreter and compiler need no GPU; a CPU build of torch does not bring it
	$(PIP_INSTALL) --no-deps dashscope  # for the tokenizer's vocabulary; the 28 packages it asks for are not needed
	touch $@ $(VENV)/.demo
