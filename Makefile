# make help lists the targets.
SHELL := /bin/sh
PYTHON := .venv/bin/python
PLUGIN := build/plugin
NAME := freeflow:latest
REGISTRY ?=
# With make install: anything but nothing makes freeflow-runc the engine's default runtime.
RUNTIME ?=
# A public Debian image to build the plugin from with docker build; empty: from the Debian archive, with mmdebstrap.
BASE ?=
# A plugin cannot have a manifest for several architectures, so the tag names the architecture.
ARCH := $(shell dpkg --print-architecture 2>/dev/null || uname -m)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The files that lint checks: those that git tracks, or without a repository all that are there.
SOURCES := $(or $(shell git ls-files 2>/dev/null),$(shell find . -type f -not -path './.venv/*' -not -path './build/*'))
SCRIPTS := $(filter %.sh %.ci/run,$(SOURCES))
C_FILES := $(filter %.c %.h,$(SOURCES))
PYTHON_FOLDERS := plugin driver dataplane bench testbed tests tools
CODE := $(shell find plugin driver dataplane config.json -not -name '*.pyc' -type f 2>/dev/null)

.PHONY: help setup venv library verbs ebpf relay runtime plugin prepare install uninstall push test unit kernel swarm vm long encryption torture lint pictures screenshots docs demo bench settings clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: ## install what is missing: Debian packages and the virtual environment
	@plugin/image/setup.sh
	@$(MAKE) --no-print-directory venv

venv: .venv/.done

.venv/.done: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install --quiet --editable '.[test]'
	touch $@

library: build/libfreeflow.so ## build the library that containers preload

build/libfreeflow.so: $(wildcard dataplane/library/*)
	@plugin/image/setup.sh
	dataplane/library/build.sh $@

verbs: build/verbs/libibverbs.so.1 ## build the libibverbs that containers preload

build/verbs/libibverbs.so.1: $(wildcard dataplane/verbs/* dataplane/verbs/companion/* dataplane/library/*.h)
	@plugin/image/setup.sh
	dataplane/verbs/build.sh $@

ebpf: build/overlay.bpf.o ## build the eBPF programs of the fast path

build/overlay.bpf.o: $(wildcard dataplane/ebpf/*.[ch] dataplane/ebpf/build.sh)
	@plugin/image/setup.sh
	dataplane/ebpf/build.sh $@

relay: build/freeflow-relay build/freeflow-relay-memory ## build the relay, which moves rings to other hosts, and one for tests

build/freeflow-relay: $(wildcard dataplane/relay/* dataplane/library/*.h)
	@plugin/image/setup.sh
	dataplane/relay/build.sh $@

build/freeflow-relay-memory: $(wildcard dataplane/relay/* dataplane/library/*.h)
	@plugin/image/setup.sh
	dataplane/relay/build.sh --memory $@

runtime: build/freeflow-runc ## build the OCI runtime that adds the library to containers

build/freeflow-runc: $(wildcard plugin/runtime/*)
	@plugin/image/setup.sh
	plugin/runtime/build.sh $@

plugin: $(PLUGIN)/config.json ## build the plugin into build/plugin

$(PLUGIN)/config.json: $(CODE)
	@plugin/image/setup.sh
	$(if $(BASE),BASE=$(BASE) plugin/image/from-docker.sh,plugin/image/rootfs.sh) $(PLUGIN)

install: plugin ## install the plugin into this machine's own Docker; with RUNTIME=1 as the default runtime too
	plugin/image/install.sh $(PLUGIN) $(NAME)
	$(if $(RUNTIME),plugin/image/install-runtime.sh)

uninstall: ## remove it from this machine's own Docker
	-freeflow runtime uninstall
	freeflow cleanup --all
	docker plugin disable $(NAME)
	docker plugin rm $(NAME)

push: plugin ## push the plugin to REGISTRY, tagged by version and architecture
	@test -n "$(REGISTRY)" || { echo "make push REGISTRY=host:port"; exit 2; }
	docker plugin create $(REGISTRY)/freeflow:$(VERSION)-$(ARCH) $(PLUGIN)
	docker plugin push $(REGISTRY)/freeflow:$(VERSION)-$(ARCH)
	docker plugin rm $(REGISTRY)/freeflow:$(VERSION)-$(ARCH)

prepare: setup ## make what tests run in: root file systems of engines and guests, container images
	@$(PYTHON) -m testbed.prepare $(ONLY)

test: setup library verbs ebpf relay plugin prepare lint ## install what is missing and run all tests
	@tests/run.sh $(PYTHON)

unit: venv ## tests without root
	$(PYTHON) -m pytest tests/unit tests/contract -m 'not kernel'

kernel: setup ebpf ## tests in fresh network namespaces
	$(PYTHON) -m pytest tests/kernel tests/contract

swarm: setup plugin ## scenarios on a real Swarm
	@$(PYTHON) -m testbed.prepare swarm
	$(PYTHON) -m pytest tests/swarm

vm: setup library ebpf relay plugin ## tests in virtual machines: RDMA, kernels of several ages, IPVS
	@$(PYTHON) -m testbed.prepare vm
	$(PYTHON) -m pytest tests/vm

encryption: setup library ebpf relay plugin ## encrypted networks of the built plugin in virtual machines, on kernels of several ages
	@$(PYTHON) -m testbed.prepare vm
	$(PYTHON) -m pytest tests/vm/test_encrypted_hosts.py tests/vm/test_kernels.py -k 'wireguard or encrypted'

long: setup library verbs ebpf relay plugin prepare ## tests that take minutes each, and that `make test` leaves out
	$(PYTHON) -m pytest -m long

torture: setup library verbs relay ## a million races of bells; the torture test for an hour, and for an hour with each sanitizer; all of perftest, on one host and between two; 1,000 lost links
	BELL_ROUNDS=$${BELL_ROUNDS:-1000000} $(PYTHON) -m pytest tests/dataplane/test_bells.py
	TORTURE_SECONDS=$${TORTURE_SECONDS:-3600} $(PYTHON) -m pytest tests/dataplane/test_torture.py -k 'accelerated or library' -o faulthandler_timeout=0
	HERD_CLIENTS=50 PERFTEST_ALL=1 $(PYTHON) -m pytest tests/verbs/test_herd.py tests/verbs/test_perftest.py tests/verbs/test_far_applications.py -k 'herd or perftest'
	RELAY_LOSSES=$${RELAY_LOSSES:-1000} $(PYTHON) -m pytest tests/relay/test_tcp.py -k again --timeout=0 -o faulthandler_timeout=0

lint: setup ## ruff, mypy, shellcheck, clang-format; the width of prose, the subjects of commits
	.venv/bin/ruff check $(PYTHON_FOLDERS)
	.venv/bin/ruff format --check $(PYTHON_FOLDERS)
	.venv/bin/mypy --no-error-summary $(PYTHON_FOLDERS)
	shellcheck $(SCRIPTS)
	clang-format --dry-run -Werror $(C_FILES)
	$(PYTHON) -m tools.prose
	$(PYTHON) -m tools.commit_subjects

pictures: venv ## make the documentation's pictures, charts and list of source files
	@plugin/image/setup.sh graphviz
	$(PYTHON) -m tools.pictures
	$(PYTHON) -m tools.files

screenshots: venv ## take the pictures of the live page
	@plugin/image/setup.sh
	$(PYTHON) -m tools.screenshots

docs: venv ## build the documentation as a site, and check its links: build/docs/site/index.html
	$(PYTHON) -m tools.site

demo: setup plugin ## compare one stack on FreeFlow and on overlay, on two Docker hosts; build/demo.svg
	$(PYTHON) -m bench.demo

bench: setup plugin ## measure beside Docker's overlay and the host network; build/bench.json, build/bench.txt
	$(PYTHON) -m bench all --out build/bench.json --table build/bench.txt

settings: venv ## write config.json, docs/options.md and docs/grafana.json anew from the code
	$(PYTHON) -m tools.write_settings
	$(PYTHON) -m tools.grafana

clean: ## remove what was built, and leftovers of test beds
	-$(PYTHON) -m testbed down
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache
