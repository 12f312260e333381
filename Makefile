# make demo: a fresh environment, the shipped checkpoint exported, a grid of digits.   make test: the tests.
# make bench: the short form of every benchmark, and docs/benchmarks.md.
# make docs: the documentation as a site, build/site.
# make gpu-check: on a machine with a GPU, everything that needs one.   make native: the CPU engine and its tests.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt
EXTRAS := onnx,cpu,trt,train,bench,docs,dev

# Their metadata asks for torchvision, which nothing here needs and which would replace torch by a CUDA build.
NO_DEPS := denoising-diffusion-pytorch torch-fidelity
# What the first needs apart from that.
NO_DEPS_NEED := einops ema-pytorch accelerate scipy

# What assets/digits.pt does not hold (assets/MODEL_CARD.md), as arguments of an export.
DIGITS_FACTS := $$($(PY) -m judging.digits)
TARGETS := sm86,sm89,sm120

# Reference data of the original implementations, where it lies beside the checkout.
GOLDEN := $(abspath ../shared/golden)
ifneq ($(wildcard $(GOLDEN)/.),)
export UNET_RT_GOLDEN ?= $(GOLDEN)
endif

# Where there is no compiler, the CPU engine is left out.
NATIVE := $(if $(and $(shell command -v cmake),$(shell command -v c++ || command -v $(CXX))),native)

CPP_SOURCES := $(wildcard kernels/native/*/*.cpp kernels/native/*/*.h)

# The tests of `make check`: a tenth of the time of all. What exports, compiles or runs many networks is left out.
FAST_TESTS := tests/test_imports.py $(addprefix tests/engine/,bundle checkpoints cli diffusion sampling \
    test_files.py test_images.py test_surface.py) -k "not export and not graph_slots and not mixed_batch"

# Tests run on as many workers as there are cores (tests/conftest.py). WORKERS=0: one after the other, for a debugger.
WORKERS ?= auto
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: venv native demo check docs test test-slow bench gpu-check lint format clean
# Installing builds the library too.
.NOTPARALLEL:

venv: $(VENV)/installed $(NATIVE)

# An existing environment is only added to, never rebuilt.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$(EXTRAS)]' $(NO_DEPS_NEED)
	$(PIP) --no-deps $(NO_DEPS)
	touch $@

native:
	cmake -S . -B build/native
	cmake --build build/native --parallel $(shell nproc)

demo: venv
	rm -rf demo
	$(PY) -m export.to_trt assets/digits.pt --out demo/digits.engine --target $(TARGETS) $(DIGITS_FACTS)
	$(PY) -m engine sample demo/digits.engine -n 100 --steps 50 --sampler ddim --per-class --seed 0 \
	    --grid demo/digits.png --enlarge 2 --out demo/samples

# What to run before each commit: under a minute on two cores.
check: lint
	$(PYTEST) -q -m "not slow and not gpu" $(FAST_TESTS)

test: venv
	$(PYTEST) -m "not slow and not gpu"

test-slow: venv
	$(PYTEST) -m "slow and not gpu"

# A broken link, a missing anchor, an undocumented public name or a foreign asset fails.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

gpu-check: venv
	$(PY) -m benchmarks.gpu_check --out gpu_check

# Writes docs/benchmarks.md and the table in README.md.
bench: venv
	$(PY) -m benchmarks.suite --readme README.md

lint: venv
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(PY) -m mypy

format: venv
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf demo gpu_check build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
