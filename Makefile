# hyperbell: `make demo` shows it at work on a real guest, `make test` passes the tests. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
# What pyproject.toml's [build-system] asks for: in the venv itself, so that pip need not fetch it a second time.
BUILD_REQUIRES := 'setuptools>=68' 'cffi>=1.16'
PREFIX ?= /usr/lib/hyperbell
DESTDIR ?=
# The folders with C of ours (setup.py): of all but the last cffi makes Python modules, by their build.py.
C_FOLDERS := virtio/dataplane virtio/usernet transports/kvm/native transports/stock_qemu/library
C_SOURCES := $(foreach f,$(C_FOLDERS),$(wildcard $f/*.[ch] $f/*/*.[ch] $f/build.py))

.PHONY: help setup demo test test-nested test-ground check lint types c-check bench build stub install clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(VENV)/.ready ## install what is missing (Debian packages, .venv) and build the data plane

# The stamp depends on everything that goes into the venv; the packages are looked up each time the stamp is made.
$(VENV)/.ready: pyproject.toml setup.py packages.txt $(C_SOURCES)
	@./install-packages.sh run build test
	@test -x $(BIN)/python || { echo "== creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing Python packages and compiling the data plane"
	@rm -rf build
	@$(BIN)/pip install --quiet --disable-pip-version-check $(BUILD_REQUIRES)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	@touch $@

build: $(VENV)/.ready ## compile the data plane again after a change of C

demo: setup ## a real Linux guest reads and writes its disk through hyperbell
	@$(BIN)/python -m guest.demo

# A process for each CPU; tests/conftest.py says how they share the tests. Four at most: each may boot a machine.
test: check ## everything: lint, types, unit, devices, integration, sanitizers, real guests
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --no-loadscope-reorder --cov

# An emulated host for each file: one that gets stuck does not take the others with it.
test-nested: setup ## the whole matrix of guests in guests: real KVM, emulated (takes half an hour)
	@failed=; for f in tests/nested/test_*.py; do \
	  $(BIN)/python -m pytest $$f -m "nested or nested_full" || failed="$$failed $$f"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# ARGS chooses among the cells: ARGS="--qemu 11.1 --kernel 7.3". A cell takes minutes.
test-ground: setup ## the guest tests over QEMU 7.2 to 11.1 and Linux 6.1 to 7.3, none installed; writes docs/works-with.md
	@$(BIN)/python -m tests.ground $(ARGS)

check: lint types c-check ## lint, strict types, C warnings

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# The tests import each other by their paths from tests/, the benchmark and the matrix are packages of their own.
types: setup
	@$(BIN)/mypy
	@MYPYPATH=tests $(BIN)/mypy --explicit-package-bases $$(find tests -name '*.py' -not -path 'tests/bench/*' -not -path 'tests/ground/*')
	@$(BIN)/mypy --explicit-package-bases tests/bench tests/ground

# Then the data plane for 64-bit ARM: of the headers only liburing's, which hold for any processor, are this machine's.
c-check: setup
	@for f in $(filter %.c,$(C_SOURCES)); do \
	  gcc -Ivirtio/dataplane -std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Werror -fsyntax-only $$f || exit 1; done
	@aarch64-linux-gnu-gcc -Ivirtio/dataplane -idirafter /usr/include -std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Werror \
	  -fsyntax-only $(filter virtio/dataplane/%.c,$(C_SOURCES))
	@for f in guest/toy/*.c guest/toy/*/*.c; do for bits in 32 64; do \
	  gcc -Iguest/toy -m$$bits -std=gnu11 -O2 -ffreestanding -fno-strict-aliasing -mgeneral-regs-only \
	    -Wall -Wextra -Wshadow -Werror -fsyntax-only $$f || exit 1; done; done

bench: setup ## figures beside qemu-storage-daemon and DPDK (takes minutes; wants a quiet machine)
	@$(BIN)/python -m tests.bench.run $(ARGS)
	@$(BIN)/python -m tests.bench.vsock
	@$(BIN)/python -m tests.bench.neighbour

stub: ## rewrite the stubs of the compiled modules after changing a *.cdef.h
	@$(PYTHON) virtio/dataplane/stub.py

pages: setup ## rewrite the pages that are made from tables (docs/metrics.md)
	@PYTHONPATH=tests:. $(BIN)/python -m kit.metrics_page

install: ## a venv of its own under PREFIX, the command, the systemd units (as root)
	@./install-packages.sh run build
	$(PYTHON) -m venv $(DESTDIR)$(PREFIX)
	rm -rf build
	$(DESTDIR)$(PREFIX)/bin/pip install --quiet --disable-pip-version-check $(BUILD_REQUIRES)
	$(DESTDIR)$(PREFIX)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --upgrade .
	install -d $(DESTDIR)/usr/bin $(DESTDIR)/etc/hyperbell
	ln -sf $(PREFIX)/bin/hyperbell $(DESTDIR)/usr/bin/hyperbell
	install -D -m 644 systemd/hyperbell.service $(DESTDIR)/usr/lib/systemd/system/hyperbell.service
	install -D -m 644 systemd/sysusers.d/hyperbell.conf $(DESTDIR)/usr/lib/sysusers.d/hyperbell.conf
	install -D -m 644 systemd/tmpfiles.d/hyperbell.conf $(DESTDIR)/usr/lib/tmpfiles.d/hyperbell.conf
# For a package, the paths without DESTDIR; otherwise the user, the folders and the unit, where systemd runs.
	[ -z "$(DESTDIR)" ] || grep -rlI -- "$(DESTDIR)" $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/pyvenv.cfg | xargs -r sed -i "s#$(DESTDIR)##g"
	[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || \
	  { systemd-sysusers hyperbell.conf && systemd-tmpfiles --create hyperbell.conf && systemctl daemon-reload; }

clean: ## remove what was built (.venv and the cache of downloads stay)
	rm -rf build *.egg-info virtio/_dataplane*.so virtio/_dataplane.c virtio/_usernet*.so virtio/_usernet.c transports/_vmm*.so transports/_vmm.c \
	  transports/stock_qemu/library/_library*.so $(VENV)/.ready
