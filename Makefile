# Serin: the commands of a developer. `make demo` and `make test` do their own set-up.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Outside the clone, so that a kept machine builds warm.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/serin-target
PROFILE ?= demo
BIN := $(CARGO_TARGET_DIR)/$(PROFILE)
ARGS ?=

.PHONY: help setup build demo test lint bench soak pgo crds clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install the system packages (as root, with apt), or name them
	@hack/setup.sh

build: setup ## Build the programs: serin, serin-proxy, serin-example
	cargo build --locked --profile $(PROFILE) -p serin -p serin-proxy -p serin-example

demo: build ## Play the story: a good release promoted, a bad one rolled back (ARGS="--keep" leaves it running)
	$(BIN)/serin demo $(ARGS)

test: ## Format, lints, documentation, every test, and the demo
	hack/test.sh

lint: setup ## Format, clippy with warnings denied, documentation with warnings denied
	hack/lint.sh

bench: build ## Measure: the figures of the README, as ratios against peers where they are installed
	hack/bench.sh $(ARGS)

pgo: build ## Build serin-proxy optimised by a profile of the benchmark (prints where it is)
	hack/pgo.sh

soak: ## Hold the proxy under load and churn, memory flat (SERIN_SOAK_SECONDS, 60)
	hack/bench.sh soak

crds: ## Regenerate crds/manifests
	cargo run --locked -q -p serin-crds --bin crdgen

clean: ## Remove what was built
	rm -rf -- "$(CARGO_TARGET_DIR)"
