# Every target does its own set-up and may be run again or interrupted at any time: a stamp in build/ is written last,
# after the step it stands for has succeeded.
#   make setup     system packages (apt, as root, only what is missing), .venv, editable install
#   make test      native tests (ctest) and Python tests (pytest)
#   make lint      ruff, clang-format, pyright
#   make format    rewrite what ruff and clang-format can
#   make test-posix  the file system suites; PJDFSTEST=DIR FSX=FILE FSSTRESS=FILE MDTEST=FILE FILEBENCH=FILE name
#                  installed copies of those that Debian lacks
#   make test-rdma  RDMA between soft-RoCE devices in a virtual machine (QEMU and a Debian kernel, kept in build/rdma-vm), which
#                  may run for RDMA_VM_SECONDS
#   make interop   other projects' programs, pinned and as released, on a kvfs mount (INTEROP_CACHE: where they are kept);
#                  FIO_USRBIO=FILE and HF3FS_USRBIO_TEST=FILE name what the registries lack of 3FS's own
#   make test-engines  kvfs's connectors in the real engines, pinned (ENGINES_CACHE: where these are kept)
#   make test-engines-quick  the part of it that takes minutes: LMCache's own checks
#   make sanitize  native tests under ASan+UBSan, the threaded ones under TSan
#   make fuzz      each fuzzer for FUZZ_SECONDS
#   make demo      a guided run against a real mount
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup test test-native test-python test-posix test-rdma interop test-engines test-engines-quick lint format sanitize fuzz demo clean

PYTHON ?= python3
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 20
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps

APT := ca-certificates git cmake ninja-build pkg-config gcc g++ python3-dev python3-venv \
       fuse3 libfuse3-dev liburing-dev libxxhash-dev libsodium-dev libgtest-dev libibverbs-dev librdmacm-dev \
       rsync fio strace iproute2 nftables
APT_SUITES := perl stress-ng fsmark dbench openmpi-bin util-linux postgresql git
APT_RDMA := qemu-system-x86 kmod zstd iproute2 util-linux ibverbs-providers perftest python3-pyverbs
APT_CLANG := clang libclang-rt-dev clang-format llvm

NATIVE := $(shell find native CMakeLists.txt -type f 2>/dev/null)
PY := $(shell git ls-files '*.py' 2>/dev/null)
CXX_FILES := $(shell git ls-files 'native/*.h' 'native/*.cpp' 2>/dev/null)

help:
	@sed -n 's/^#   //p' Makefile

# apt_install PACKAGES: installs what dpkg does not know as installed; does nothing, and needs no root, otherwise.
define apt_install
if ! command -v dpkg-query >/dev/null; then \
  echo "not a Debian system; these packages' equivalents are needed: $(1)" >&2; exit 0; \
fi; \
missing=""; \
for package in $(1); do \
  dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
done; \
if [[ -n "$$missing" ]]; then \
  echo "installing:$$missing"; \
  if [[ $$(id -u) != 0 ]]; then echo "run as root: apt-get install$$missing" >&2; exit 1; fi; \
  export DEBIAN_FRONTEND=noninteractive; \
  dpkg --configure -a; \
  apt-get update -q; \
  apt-get install -q -y --no-install-recommends $$missing; \
fi
endef

$(STAMPS)/apt: Makefile
	@$(call apt_install,$(APT))
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/apt-suites: Makefile
	@$(call apt_install,$(APT_SUITES))
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/apt-rdma: Makefile
	@$(call apt_install,$(APT_RDMA))
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/apt-clang: Makefile
	@$(call apt_install,$(APT_CLANG))
	@mkdir -p $(STAMPS) && touch $@

# The interpreter is copied into the stamp's name by its version, so that another python3 makes another environment.
$(STAMPS)/venv: Makefile | $(STAMPS)/apt
	@[[ -x $(BIN)/python ]] && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/install: $(STAMPS)/venv pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	@mkdir -p $(STAMPS) && touch $@

setup: $(STAMPS)/install

test: test-native test-python

test-native: $(STAMPS)/apt
	cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release >build/native.log || { cat build/native.log; exit 1; }
	cmake --build build/native -j $(JOBS)
	ctest --test-dir build/native --output-on-failure

test-python: setup
	$(BIN)/python -m pytest --timeout=120 -rs $(PYTEST_ARGS)

test-posix: setup $(STAMPS)/apt-suites
	$(BIN)/python -m pytest --timeout=900 -rs tests/posix tests/suites $(PYTEST_ARGS)

test-rdma: setup
	@$(MAKE) --no-print-directory $(STAMPS)/apt-rdma || echo "packages are missing: the tests that need them are skipped"
	cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release >build/native.log || { cat build/native.log; exit 1; }
	cmake --build build/native -j $(JOBS) --target rdma_test rdma_failure_test rdma_node_test rdma_bench
	$(BIN)/python -m pytest -rs tests/rdma_vm $(PYTEST_ARGS)

# Their environments are kept in INTEROP_CACHE. The wheel is built as a user would build it.
interop: setup
	rm -rf build/interop
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w build/interop .
	INTEROP_WHEEL="$$(echo $(CURDIR)/build/interop/kvfs-*.whl)" \
	  $(BIN)/python -m pytest --timeout=1800 -rs tests/engines tests/interop/test_fio_usrbio.py $(PYTEST_ARGS)

ENGINE_TESTS = tests/inference
test-engines: setup
	rm -rf build/engines
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w build/engines .
	INTEROP_WHEEL="$$(echo $(CURDIR)/build/engines/kvfs-*.whl)" \
	  INTEROP_CACHE="$${ENGINES_CACHE:-$$HOME/.cache/kvfs-engines}" \
	  $(BIN)/python -m pytest --timeout=1800 -rs $(ENGINE_TESTS) $(PYTEST_ARGS)

test-engines-quick: ENGINE_TESTS = tests/inference/test_lmcache_plugins.py
test-engines-quick: test-engines

lint: setup $(STAMPS)/apt-clang
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(if $(CXX_FILES),clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/pyright --pythonpath $(BIN)/python $(PY)

format: setup $(STAMPS)/apt-clang
	$(BIN)/ruff check --fix --exit-zero $(PY)
	$(BIN)/ruff format $(PY)
	$(if $(CXX_FILES),clang-format -i $(CXX_FILES))

sanitize: $(STAMPS)/apt
	cmake -S . -B build/asan -G Ninja -DKVFS_SANITIZE=address >build/asan.log || { cat build/asan.log; exit 1; }
	cmake --build build/asan -j $(JOBS)
	ctest --test-dir build/asan --output-on-failure
	cmake -S . -B build/tsan -G Ninja -DKVFS_SANITIZE=thread >build/tsan.log || { cat build/tsan.log; exit 1; }
	cmake --build build/tsan -j $(JOBS)
	ctest --test-dir build/tsan --output-on-failure

# A fuzzer keeps what it learns in build/corpus/NAME; a crashing input is left in build/NAME-crash-*.
fuzz: $(STAMPS)/apt $(STAMPS)/apt-clang
	cmake -S . -B build/fuzz -G Ninja -DKVFS_FUZZ=ON -DKVFS_TESTS=OFF -DCMAKE_C_COMPILER=clang \
	  -DCMAKE_CXX_COMPILER=clang++ >build/fuzz.log || { cat build/fuzz.log; exit 1; }
	cmake --build build/fuzz -j $(JOBS)
	@for fuzzer in build/fuzz/fuzz/fuzz_*; do \
	  [[ -x "$$fuzzer" ]] || continue; \
	  name=$$(basename "$$fuzzer"); mkdir -p "build/corpus/$$name"; echo "== $$name"; \
	  seeds=(); [[ -d "native/fuzz/corpus/$$name" ]] && seeds=("native/fuzz/corpus/$$name"); \
	  "$$fuzzer" -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
	    -artifact_prefix="build/$$name-" "build/corpus/$$name" "$${seeds[@]}" >"build/$$name.log" 2>&1 || \
	    { tail -n 100 "build/$$name.log"; exit 1; }; \
	  grep -E '^(Done|stat::number)' "build/$$name.log"; \
	done

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo $(TRACE)

clean:
	rm -rf build $(VENV) dist .pytest_cache .ruff_cache
