# make demo · test · test-all · bench · lint · sanitize · threads · neon · wheel · gpu. Each sets up what it needs, in
# .venv, once.
#
#   make demo PROMPT="def main(" MODEL=folder-or-hub-name N=200
#   make test PYTHON=/path/to/python   a Python that has torch (2.11 or newer) lends it; one without gets a pinned one
#   make test CUDA=1                   PyPI's CUDA build of torch instead of the CPU build (several GB)
#   make bench QUICK=1 OUT=folder      fewer rounds; where the results go, by default benchmarks/results
#   make gpu                           on a machine with a GPU, with the torch of PYTHON: no .venv and no registry
#   make gpu REHEARSE=1                the same script without a GPU, on the PTX machine
#
# .venv keeps the PYTHON it was made with: `make clean` comes before another.

PYTHON ?= python3
PROMPT ?= def main(
MODEL ?=
N ?= 200
TESTS ?= tests
# Processes that share the tests, one a core: pytest-xdist's. More than four would want more memory than laptops have.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)))
CUDA ?=
QUICK ?=
OUT ?=
REHEARSE ?=
# PyTorch's index of CPU builds. Where it does not answer, pip's usual places serve torch (on Linux maybe with CUDA).
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PIN := -c $(VENV)/constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
TORCH_STAMP := $(VENV)/.torch-$(if $(CUDA),cuda,cpu)
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test test-all bench lint sanitize threads neon wheel gpu clean same-python
.DELETE_ON_ERROR:
export PROMPT MODEL

demo: $(VENV)/.built
	@$(BIN)/python -m gpt2fast generate "$$PROMPT" $(if $(MODEL),--model "$$MODEL") -n $(N) --repetition-penalty 1.1

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS) -m ""

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks$(if $(QUICK), --quick)$(if $(OUT), --out "$(OUT)")

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z '*.h' '*.cpp' '*.cuh' '*.cu' | xargs -0 $(BIN)/clang-format --dry-run --Werror

sanitize threads neon: $(TORCH_STAMP)
	PYTHON=$(BIN)/python tests/native/run.sh $@

gpu: $(if $(REHEARSE),$(VENV)/.test)
	$(if $(REHEARSE),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(if $(REHEARSE),--rehearse)

wheel: $(VENV)/.built
	$(PIP) wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf $(VENV) build dist *.egg-info gpt2fast/_C*.so gpt2fast/_ptx*.so

# --- what the targets need ---

# A missing tool is named with the command that installs it, before anything is downloaded or built.
define PREFLIGHT
need() { if [ "$$(uname -s)" = Darwin ]; then how="$$4"; \
  elif command -v apt-get >/dev/null; then how="sudo apt-get install $$2"; \
  elif command -v dnf >/dev/null; then how="sudo dnf install $$3"; \
  else how="your package manager ($$2 or $$3)"; fi; echo "make: missing: $$1. Install it with: $$how" >&2; exit 1; }; \
$(PYTHON) -c '' 2>/dev/null || need "$(PYTHON)" python3 python3 "brew install python"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || need "Python 3.11 or newer ($(PYTHON) is older; name another by PYTHON=)" python3 python3 "brew install python"; \
echo '#include <cstdint>' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null \
  || need "a C++20 compiler ($${CXX:-c++})" g++ gcc-c++ "xcode-select --install"; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
  || need "Python's module venv" python3-venv python3 "brew install python"; \
test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
  || need "Python's headers (Python.h)" python3-dev python3-devel "brew install python"
endef

# .venv is made once: a PYTHON that it was not made with is refused, not ignored.
WHO = $(PYTHON) -c 'import sys; print(sys.prefix, "%d.%d" % sys.version_info[:2])'
same-python:
	@if [ "$(origin PYTHON)" != file ] && [ -s $(VENV)/.made ]; then \
	  asked=$$($(WHO)); made=$$(cat $(VENV)/.made); \
	  if [ "$$asked" != "$$made" ] && [ "$${asked% *}" != "$(abspath $(VENV))" ]; then \
	    echo "make: $(VENV) was made with the Python of $$made, PYTHON=$(PYTHON) is that of $$asked:" \
	      "run make clean first" >&2; exit 1; fi; fi

# Lent torch: by --system-site-packages, and by a .pth for a PYTHON that is itself of an environment. Its version is
# what it is, so the constraints leave it out.
$(VENV)/.made: | same-python
	@$(PREFLIGHT)
	@if [ "$(origin PYTHON)" != file ] && \
	  lent=$$($(PYTHON) -c 'import torch, os; assert torch.torch_version.TorchVersion(torch.__version__) >= "2.11"; \
	    print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); then \
	  echo "Using the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && touch $(VENV)/.torch-lent && \
	  echo "$$lent" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent_torch.pth"; \
	else $(PYTHON) -m venv $(VENV); fi
	@$(WHO) > $@

$(TORCH_STAMP): constraints.txt | $(VENV)/.made
	@echo "Installing $(if $(wildcard $(VENV)/.torch-lent),build tools,torch) ..."
	@if [ -e $(VENV)/.torch-lent ]; then grep -v '^torch==\|^triton==' constraints.txt > $(VENV)/constraints.txt; \
	else grep -v '$(if $(CUDA),^triton==,^$$)' constraints.txt > $(VENV)/constraints.txt; fi
	@if [ -e $(VENV)/.torch-lent ]; then \
	  if [ -n "$(CUDA)" ]; then echo "CUDA=1 changes nothing: torch is that of PYTHON"; fi; \
	elif [ -n "$(CUDA)" ]; then \
	  if $(PIP) list 2>/dev/null | grep -q '^torch .*+cpu'; then $(PIP) uninstall -y torch; fi; \
	  $(PIP) install $(TORCH); \
	elif [ "$$(uname -s)" = Linux ] && \
	  $(PIP) install --dry-run --no-deps --timeout 5 --retries 1 --index-url $(CPU_INDEX) $(TORCH) >/dev/null 2>&1; then \
	  $(PIP) install --no-deps --force-reinstall --retries 1 --index-url $(CPU_INDEX) $(TORCH); \
	else echo "$(CPU_INDEX) does not answer: torch comes from pip's usual places (on Linux maybe the CUDA build)"; \
	  $(PIP) install $(TORCH); fi
	@$(PIP) install $(PIN) torch numpy setuptools wheel ninja
	@rm -f $(VENV)/.torch-cpu $(VENV)/.torch-cuda && touch $@

$(VENV)/.installed: $(TORCH_STAMP) setup.py gpt2fast/compiler_flags.py pyproject.toml
	@$(PREFLIGHT)
	@echo "Building gpt2fast ..."
	@$(PIP) install $(PIN) --no-build-isolation -e '.[text,cli]'
	@touch $@

# pip builds from scratch; later changes to the sources compile only what they touch.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@if [ -n "$$(find $(SOURCES) -newer $(VENV)/.installed)" ]; then \
	  echo "Building gpt2fast ..." && $(BIN)/python setup.py -q build_clib build_ext --inplace; fi
	@touch $@

# The package is there by now: pip adds only what the extras name. The PTX machine is built where tests need it.
$(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(VENV)/.built
	@GPT2FAST_PTX=1 $(BIN)/python setup.py -q build_clib build_ext --inplace
	@$(PIP) install $(PIN) 'gpt2fast[$*]'
	@$(BIN)/python tests/fetch_ranks.py || true
	@$(BIN)/python tests/fetch_transformers.py || true
	@touch $@

$(VENV)/.lint: constraints.txt | $(VENV)/.made
	@$(PIP) install -c constraints.txt ruff clang-format
	@touch $@
