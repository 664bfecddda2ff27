# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS := $(shell nproc 2>/dev/null || echo 2)
SANITIZER_GPU := $(shell command -v compute-sanitizer 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help venv build test compile emulate lint format bench test-nanotron test-versions test-pythons wheel test-gpu fuzz build-here bench-gpu gpu gpu-again gpu-keep tune report demo sanitize run-native clean docs

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(READY) ## make .venv with all that tests and checks need (PYTHON=python3.12 picks another)

# Built without isolation, so that `make build` finds the same headers and reuses the objects.
$(READY): pyproject.toml setup.py setup_cuda.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq -c constraints.txt setuptools pybind11 ninja
	$(BIN)/pip install -qq -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@

build: $(READY) ## compile what changed in csrc
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -m compileall -q nanotron_fast  # also where the environment forbids caching

test: build ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

compile: build ## compile every kernel launch for sm_80, sm_90 and sm_100, without a GPU
	$(BIN)/pytest tests/kernels/test_compiles.py --every-binary

emulate: build ## run the kernels as they are compiled for sm_90 on an emulator of a GPU (ARCH=80 SEED=1)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.emulator --arch $(or $(ARCH),90) \
	  --seed $(or $(SEED),0) -q -n $(JOBS)

lint: $(READY) ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(READY) ## rewrite everything in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: build ## time conversion against cp and torch, the kernels' CPU paths, a training step, launches
	$(BIN)/python benchmarks/bench_convert.py
	$(BIN)/pytest benchmarks/test_kernels.py
	$(BIN)/python benchmarks/bench_train.py --cpu
	$(BIN)/python benchmarks/bench_launch.py

# Its own environment, laid over .venv: what Nanotron needs is older than what we are tested with.
NANOTRON_VENV := .venv-nanotron
test-nanotron: build ## install the released Nanotron beside us, without flash-attn, and train with it
	test -x $(NANOTRON_VENV)/bin/python || $(BIN)/python -m venv $(NANOTRON_VENV)
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > $$(echo $(NANOTRON_VENV)/lib/python3*/site-packages)/development.pth
	$(NANOTRON_VENV)/bin/python -m pip install -qq --no-deps --ignore-installed -r tests/nanotron/requirements.txt
	$(NANOTRON_VENV)/bin/python -m pytest tests/nanotron

# Beside .venv, so that nothing else meets it; where there is no wheel of it, without.
FUZZER := build/fuzz/site
fuzz: build ## feed random input to every reader (SECONDS=300 in all, TARGET= one alone)
	@mkdir -p $(FUZZER)
	@test -d $(FUZZER)/atheris || $(BIN)/pip install -qq -c constraints.txt --no-deps \
	  --only-binary :all: --target $(FUZZER) atheris 2>/dev/null \
	  || echo "atheris cannot be installed here, which has wheels for some versions of Python" >&2
	OMP_NUM_THREADS=1 PYTHONPATH=$(FUZZER) $(BIN)/python -m tests.fuzz \
	  --seconds $(or $(SECONDS),300) $(if $(TARGET),--target $(TARGET))

test-pythons: build ## build with each other Python that is here, and run there the tests that need no torch
	$(BIN)/python -m tests.pythons

# Both build in this folder: one after the other where both are asked for.
wheel: $(READY) | $(filter test-pythons,$(MAKECMDGOALS)) ## build sdist and wheel as a release has them, and try the wheel where nothing else is
	$(BIN)/python -m tests.wheel

test-versions: build ## a few tests with other versions of triton, transformers, numpy and typer
	$(BIN)/python -m tests.versions

# On a machine with a GPU, with the torch that is there: nothing is installed.
test-gpu: build-here ## build what can be built, then test kernels, parallel and a run on the GPU, the packer under compute-sanitizer
	$(PYTHON) -m pytest tests/kernels tests/parallel tests/train/test_on_gpu.py --gpu
	@if test -z '$(SANITIZER_GPU)'; then echo "compute-sanitizer is not here: skipped" >&2; \
	elif ! $(SANITIZER_GPU) --error-exitcode 1 $(PYTHON) -c 'import torch; torch.ones(1).cuda()' >/dev/null 2>&1; \
	  then echo "compute-sanitizer refuses this device, or there is none: skipped" >&2; \
	else $(SANITIZER_GPU) --error-exitcode 1 $(PYTHON) -m pytest -q tests/kernels/test_pack.py --gpu -m gpu; fi

# The kernels need no native code, but for the packer.
build-here:
	@if $(PYTHON) -c 'import ninja, pybind11, setuptools' 2>/dev/null && command -v $(CXX) >/dev/null; \
	  then $(PYTHON) setup.py --quiet build_ext --inplace; \
	  else echo "no native build: it needs pybind11, ninja, setuptools and a C++ compiler" >&2; fi

bench-gpu: build-here ## time the kernels, and training steps, beside torch and the peers that are installed
	$(PYTHON) benchmarks/bench_kernels.py $(if $(ONLY),--only $(ONLY)) \
	  $(if $(DRY),--dry,--save benchmarks/results/kernels.json)
	$(if $(ONLY),,$(PYTHON) benchmarks/bench_train.py $(if $(DRY),--dry,--save))
	@if $(PYTHON) -c 'import nanotron' 2>/dev/null; \
	  then $(PYTHON) benchmarks/bench_step.py --save; \
	  else echo "nanotron is not here: its training step is not timed" >&2; fi

# One command for a GPU's first minutes. OUT=dir is where gpu.jsonl goes, DRY=1 runs all of it on the
# CPU, BUDGET is in seconds, ONLY names operations, PROFILE those whose kernels ncu looks at, SANITIZE
# those for compute-sanitizer, or all.
RUN_GPU = $(PYTHON) benchmarks/run_gpu.py $(if $(OUT),--out $(OUT)) $(if $(DRY),--dry) \
  $(if $(BUDGET),--budget $(BUDGET)) $(if $(ONLY),--only $(ONLY))
gpu: ## everything worth knowing of a GPU in 580 seconds, most valuable first (DRY=1: on the CPU)
	$(RUN_GPU)

gpu-again: ## what failed or was left out in the last `make gpu`; ncu over PROFILE=rms_norm,glu; SANITIZE=all
	$(RUN_GPU) --again $(if $(PROFILE),--profile $(PROFILE)) $(if $(SANITIZE),--sanitize $(SANITIZE))

gpu-keep: ## the rows that `make gpu` left in OUT=dir, into benchmarks/results for `make report`
	$(RUN_GPU) --keep

# OUT is the file that is written, or a folder for tuned.json. It goes into kernels/measured/, under
# the architecture's name, for everybody to have.
tune: ## time configurations of the kernels beside their rules in 580 seconds, and keep what is faster
	$(PYTHON) benchmarks/sweep.py $(if $(OUT),--out $(OUT)) $(if $(DRY),--dry) \
	  $(if $(BUDGET),--budget $(BUDGET)) $(if $(ONLY),--only $(ONLY))

report: $(READY) ## turn benchmarks/results into tables and plots in docs/results
	$(BIN)/pip install -qq -c constraints.txt -e '.[bench]' --no-build-isolation
	$(BIN)/python benchmarks/report.py

docs: build ## build the documentation's site into build/site, every warning an error
	$(BIN)/pip install -qq -c constraints.txt -e '.[docs]' --no-build-isolation
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is in build/site"

demo: build ## convert a small Llama there and back, train it, and prove that all of it holds
	$(BIN)/python examples/demo.py

sanitize: ## native tests under ASan, UBSan and TSan (a C++ compiler is enough)
	@$(MAKE) --no-print-directory -j$(JOBS) run-native SANITIZER=address,undefined
	@$(MAKE) --no-print-directory -j$(JOBS) run-native SANITIZER=thread

clean: ## remove everything that was built, .venv too
	rm -rf $(VENV) $(NANOTRON_VENV) .venv-versions .venv-pythons build dist *.egg-info nanotron_fast/*.so .*_cache

# Everything below serves `sanitize`.
CPP := $(shell find csrc tests/native tests/kernels -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu*')
HEADERS := $(filter-out %.cpp,$(CPP))
SANITIZED := build/sanitize/$(SANITIZER)
OBJECTS := $(patsubst %.cpp,$(SANITIZED)/%.o,$(wildcard csrc/core/*.cpp csrc/cast/*.cpp csrc/hash/*.cpp))
NATIVE_TESTS := $(patsubst %.cpp,$(SANITIZED)/%,$(wildcard tests/native/test_*.cpp))
# TSan of older compilers cannot map its shadow where the kernel randomises addresses widely.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

$(SANITIZED)/%.o: %.cpp $(HEADERS)
	@echo "$(SANITIZER): $<" && mkdir -p $(@D)
	@$(CXX) -std=c++20 -O1 -g -fno-omit-frame-pointer -pthread -Wall -Wextra -Icsrc \
	  -fsanitize=$(SANITIZER) -fno-sanitize-recover=all -c $< -o $@

$(NATIVE_TESTS): %: %.o $(OBJECTS)
	@$(CXX) -fsanitize=$(SANITIZER) -pthread $^ -o $@

run-native: $(NATIVE_TESTS)
	@test -n "$^" || { echo "tests/native holds no test_*.cpp" >&2; exit 1; }
	@for test in $^; do echo "run $$test" && $(FIXED_ADDRESSES) $$test || exit 1; done
