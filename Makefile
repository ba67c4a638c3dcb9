# Three environments. .venv: the locked toolchain, the release tools and the linters, no torch.
# .venv-test: the newest torch and what the runtime's tests need, no compiler. .venv-oldest: the same
# with the oldest torch and driver bindings. A fourth, .venv-engines, is for test-engines alone: vLLM,
# the torch that it requires, and SGLang. Every package is installed by hash, but for torch, the CUDA libraries
# that come with it, and uv, which only `make lock` uses.

PYTHON ?= python3
# GPU work can run in an environment of your own: make test-gpu PYTHON_GPU=python3
PYTHON_GPU ?= .venv-test/bin/python
# Options for every run of the tests, such as PYTEST=--durations=20.
PYTEST ?=

INSTALL = -m pip install --quiet --disable-pip-version-check
LOCKED = $(INSTALL) --no-deps --require-hashes --only-binary=:all:
UV = uv==0.13.9

# Every version is stated here or in a lock: constraints in the machine's pip configuration do not count.
export PIP_CONSTRAINT = /dev/null

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build-cubins lock-cubins check-cubins environments release verify-release test \
	test-builder test-runtime test-oldest test-oldest-runtime test-oldest-oracle test-gpu verify-gpu \
	kill-trials lint format lock clean clean-venv

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build-cubins: .venv/.toolchain ## Build every cubin into artifacts/
	.venv/bin/python -m build_kernels build

lock-cubins: .venv/.toolchain ## Build, and record the digests in artifacts/artifacts.lock
	.venv/bin/python -m build_kernels build --update-lock

check-cubins: .venv/.toolchain ## Rebuild from nothing and compare with artifacts/artifacts.lock
	.venv/bin/python -m build_kernels check

release: .venv/.release ## Make a release in dist/; options: RELEASE="--target sm_90a --key KEY.pem"
	.venv/bin/python -m build_kernels release --out dist $(RELEASE)

verify-release: .venv/.release ## Check a release; options: RELEASE="dist/FOLDER --key KEY.pub --rebuild"
	.venv/bin/python -m build_kernels verify-release $(RELEASE)

environments: .venv-test/.torch .venv-oldest/.torch ## Make .venv-test and .venv-oldest

# Four runs, two at a time, the longest first; each prints its output when it has ended.
test: .venv/.dev environments ## Run every test that this machine can run
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-runtime test-builder \
	    test-oldest-runtime test-oldest-oracle

test-builder: .venv/.dev ## Run the tests of the builder, the kernels and the import rules
	.venv/bin/python -m pytest $(PYTEST) -o cache_dir=.pytest_cache/builder tests/builder tests/kernels \
	    tests/test_architecture.py

# One thread: torch's threads wait for each other by spinning, which slows down the other run.
test-runtime: .venv-test/.torch ## Run the tests of the runtime and the oracle
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest $(PYTEST) -o cache_dir=.pytest_cache/runtime \
	    tests/runtime tests/oracle tests/gpu

test-oldest: test-oldest-runtime test-oldest-oracle ## The same with the oldest torch and driver bindings

test-oldest-runtime test-oldest-oracle: test-oldest-%: .venv-oldest/.torch
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PYTEST) -m "not one_torch" \
	    -o cache_dir=.pytest_cache/oldest-$* tests/$*

# VLLM_TARGET_DEVICE: vLLM's wheel is for GPUs, and imports without one if it is told so.
.PHONY: test-engines
test-engines: .venv-engines/.installed ## Run the tests of the plug-ins in the real engines, without a GPU
	VLLM_TARGET_DEVICE=cpu OMP_NUM_THREADS=1 .venv-engines/bin/python -m pytest $(PYTEST) \
	    -o cache_dir=.pytest_cache/engines tests/engines

test-gpu: $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Run the GPU tests
	$(PYTHON_GPU) -m pytest tests/gpu

# The loader queries one kernel parameter too many on purpose, so errors of API calls are not reported.
# synccheck counts the mbarriers of all CTAs of a launch together, more than it has room for by default.
.PHONY: sanitize
sanitize: $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Run every kernel under compute-sanitizer; options: SANITIZE="dense_router_prefill/dsv4-pro"
	for tool in memcheck 'synccheck --num-cuda-barriers 65536' racecheck; do \
	    OMP_NUM_THREADS=1 compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 \
	        $(PYTHON_GPU) -m tests.gpu.sanitize $(SANITIZE) || exit 1; \
	done

.PHONY: soak
soak: $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Launch every kernel thousands of times and compare bits; options: SOAK="--seconds 60 dense_router_decode"
	$(PYTHON_GPU) -m tests.gpu.soak $(SOAK)

verify-gpu: $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Run the oracle suite on a GPU and record evidence
	$(PYTHON_GPU) -m router_runtime verify --record

.PHONY: emulation emulate record-emulation
emulation: .venv/.emulation ## Make build/emulation: tcgen05 kernels for a Hopper GPU, in software
	.venv/bin/python -m build_kernels emulate --out build/emulation --defects

# The emulation can be made on one machine and run on another, which needs no compiler.
emulate: emulation $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Make build/emulation and run its kernels on a Hopper GPU
	$(PYTHON_GPU) -m tests.emulation build/emulation
	$(PYTHON_GPU) -m tests.emulation build/emulation --defects

record-emulation: emulation $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Run the kernels of build/emulation and record those that pass as emulated
	$(PYTHON_GPU) -m tests.emulation build/emulation --record

# Kernels, a compiler, a simulator and a verifier of other projects. Nothing of theirs is part of this
# repository, and no test needs it.
CONFORMANCE = build/conformance
THEIRS = PYTHONPATH=$(CONFORMANCE)/packages TRITON_CACHE_DIR=$(CONFORMANCE)/triton .venv/bin/python -m

.PHONY: conformance emulate-conformance second-opinion
conformance: $(CONFORMANCE)/.packages ## Make build/conformance: other projects' tcgen05 kernels for a Hopper GPU
	$(THEIRS) tests.emulation.conformance.make $(CONFORMANCE)

emulate-conformance: conformance $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Make build/conformance and run its kernels on a Hopper GPU
	$(PYTHON_GPU) -m tests.emulation.conformance $(CONFORMANCE)

second-opinion: $(CONFORMANCE)/.packages ## Have sentryward verify the tcgen05 kernels; options: SECOND_OPINION="--only NAME"
	$(THEIRS) tests.emulation.second_opinion $(SECOND_OPINION)

$(CONFORMANCE)/.packages: tests/conformance.lock .venv/.emulation
	rm -rf $(CONFORMANCE)/packages
	.venv/bin/python $(LOCKED) --target $(CONFORMANCE)/packages -r $<
	@touch $@

kill-trials: .venv/.dev ## Kill builds and releases at random moments, 100 times each
	.venv/bin/python -m tests.builder.kill_trials $(TRIALS)

.PHONY: bench
bench: $(filter .venv-test/%,$(PYTHON_GPU:bin/python=.torch)) ## Time the routers on a GPU; options: BENCH="--help"
	$(PYTHON_GPU) -m tests.bench $(BENCH)

lint: .venv/.dev .venv-test/.torch ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy build_kernels tests/builder tests/kernels
	.venv-test/bin/mypy router_runtime tests --exclude '^tests/(builder|kernels)/'

format: .venv/.dev ## Rewrite the sources in the one style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# A changed lock makes a new environment, so that nothing of the old one stays behind.
.venv/.toolchain: build_kernels/toolchain.lock
	$(call new-environment,.venv)
	$(call announce,the compilers,.venv,0.8 GB on disk; one to three minutes)
	.venv/bin/python $(LOCKED) -r $<
	@touch $@

.venv/.release: build_kernels/release.lock .venv/.toolchain
	$(call announce,the release tools,.venv,seconds)
	.venv/bin/python $(LOCKED) -r $<
	@touch $@

.venv/.emulation: build_kernels/emulation.lock .venv/.toolchain
	$(call announce,the assembler,.venv,seconds)
	.venv/bin/python $(LOCKED) -r $<
	@touch $@

.venv/.dev: tests/dev.lock .venv/.release .venv/.emulation
	$(call announce,what the tests need,.venv,under a minute)
	.venv/bin/python $(LOCKED) -r $<
	@touch $@

.venv-test/.locked: tests/runtime.lock
	$(call new-environment,.venv-test)
	$(call announce,what the tests need,.venv-test,under a minute)
	.venv-test/bin/python $(LOCKED) -r $<
	@touch $@

# A step of its own, without hashes: which build of torch suits depends on the machine.
.venv-test/.torch: tests/torch-newest.txt .venv-test/.locked
	$(call announce,torch and the CUDA libraries of it,.venv-test,6 GB on disk; several minutes)
	.venv-test/bin/python $(INSTALL) -r $<
	@touch $@

.venv-oldest/.locked: tests/oldest.lock
	$(call new-environment,.venv-oldest)
	$(call announce,what the tests need,.venv-oldest,under a minute)
	.venv-oldest/bin/python $(LOCKED) -r $<
	@touch $@

.venv-oldest/.torch: tests/torch-oldest.txt .venv-oldest/.locked
	$(call announce,the oldest torch and the CUDA libraries of it,.venv-oldest,7 GB on disk; several minutes)
	.venv-oldest/bin/python $(INSTALL) -r $<
	@touch $@

# An environment of its own: vLLM requires another torch than the ones that are tested with, and SGLang a
# patch release of that. Their wheels are for the CUDA build of torch, so this one is not replaced by a
# smaller one.
.venv-engines/.locked: tests/engines.lock tests/engines-sglang.lock
	$(call new-environment,.venv-engines)
	$(call announce,what the engines and the tests need,.venv-engines,under a minute)
	.venv-engines/bin/python $(LOCKED) -r tests/engines.lock
	.venv-engines/bin/python $(LOCKED) -r tests/engines-sglang.lock
	@touch $@

.venv-engines/.torch: tests/torch-engines.txt .venv-engines/.locked
	$(call announce,torch and the CUDA libraries of it,.venv-engines,5 GB on disk; several minutes)
	.venv-engines/bin/python $(INSTALL) -r $<
	@touch $@

# The engines find the plug-ins by the metadata of an installed package.
.venv-engines/.installed: tests/engines-no-deps.lock pyproject.toml .venv-engines/.torch
	$(call announce,the engines and this checkout,.venv-engines,2 GB on disk; a minute)
	.venv-engines/bin/python $(LOCKED) -r $<
	.venv-engines/bin/python $(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# pip is quiet, and some of its steps are long: what it installs, where to, and how long that takes.
announce = @echo "installing $(1) into $(2) ($(3))"

define new-environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "expected Python 3.11 or newer, found: $$($(PYTHON) --version 2>&1);" \
	         "next: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(1)
endef

LOCK_COMMAND = build/lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 \
	--generate-hashes --no-annotate --upgrade --custom-compile-command "make lock"

# With .venv/bin on the PATH, a checkout has the command build-kernels in every folder.
.venv/bin/build-kernels: .venv/.toolchain
	printf '#!/bin/sh\nPYTHONPATH="%s" exec "%s" -m build_kernels "$$@"\n' '$(CURDIR)' '$(CURDIR)/.venv/bin/python' > $@
	chmod +x $@

lock: ## Resolve the *.in files again into the *.lock files
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(INSTALL) $(UV)
	$(LOCK_COMMAND) --no-emit-package nvidia-cutlass-dsl-libs-cu12 \
	    build_kernels/toolchain.in -o build_kernels/toolchain.lock
	$(LOCK_COMMAND) -c build_kernels/toolchain.lock build_kernels/release.in -o build_kernels/release.lock
	$(LOCK_COMMAND) -c build_kernels/toolchain.lock --no-emit-package nvidia-nvvm \
	    --no-emit-package nvidia-cuda-crt --no-emit-package nvidia-cuda-runtime \
	    build_kernels/emulation.in -o build_kernels/emulation.lock
	$(LOCK_COMMAND) -c build_kernels/toolchain.lock -c build_kernels/release.lock \
	    tests/dev.in -o tests/dev.lock
	$(LOCK_COMMAND) -c build_kernels/toolchain.lock -c build_kernels/release.lock \
	    tests/runtime.in -o tests/runtime.lock
	$(LOCK_COMMAND) tests/oldest.in -o tests/oldest.lock
	$(LOCK_COMMAND) --no-deps tests/conformance.in -o tests/conformance.lock
	$(LOCK_COMMAND) tests/engines.in -o tests/engines.lock
	$(LOCK_COMMAND) -c tests/engines.lock tests/engines-sglang.in -o tests/engines-sglang.lock
	$(LOCK_COMMAND) --no-deps tests/engines-no-deps.in -o tests/engines-no-deps.lock

clean: ## Remove what was built
	rm -rf build dist artifacts/manifest.json artifacts/inputs.json artifacts/sources.json \
	    artifacts/*.cubin

clean-venv: ## Remove the environments
	rm -rf .venv .venv-test .venv-oldest .venv-engines
