# The three stages as targets: make extract federate evaluate
#
# Every product is a real file whose manifest is written last. A stage has two files: .checked is
# touched at every check, the manifest is rewritten only when its content changed, so touching a
# configuration costs one cheap check and rebuilds nothing.

EXPERIMENT ?= demo
CONFIG := configs/$(EXPERIMENT).toml
ifeq ($(wildcard $(CONFIG)),)
$(error EXPERIMENT=$(EXPERIMENT): no $(CONFIG); there are $(patsubst configs/%.toml,%,$(wildcard configs/*.toml)))
endif
# The runs are the files of configs/<experiment>/, or the experiment's own file where there is no such folder.
VARIANTS := $(wildcard configs/$(EXPERIMENT)/*.toml)
RUNS := $(or $(notdir $(VARIANTS:.toml=)),$(EXPERIMENT))
config_of = $(firstword $(wildcard configs/$(EXPERIMENT)/$(1).toml) $(CONFIG))

BENCHMARKS := $(shell sed -n 's/^\[evaluate\.benchmarks\.\(.*\)\]/\1/p' $(CONFIG))
FEATURES := $(or $(shell sed -n "s/^features *= *.\([^\"']*\).*/\1/p" $(CONFIG)),build/features)
RUN_DIR := build/runs/$(EXPERIMENT)
SCORE_DIR := build/scores/$(EXPERIMENT)
REPORT_DIR := build/report/$(EXPERIMENT)

# An active environment or PYTHON=... is used as it is; otherwise .venv is made and installed into.
ifdef PYTHON
else ifdef VIRTUAL_ENV
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
READY := .venv/.installed
endif
FEDCMP := $(PYTHON) -m pipeline.cli
PATHS := --set experiment=$(EXPERIMENT) --set features=$(FEATURES) --set build=build

# configs/<experiment>.mk may say what the experiment is made from (INPUTS) and how that is made.
# Without it nobody knows when images, texts or models change, so every make checks them.
INPUTS := FORCE
-include configs/$(EXPERIMENT).mk

ABLATION ?= methods
BENCHES := cache aggregation training generation sites
-include configs/ablations.mk

export TOKENIZERS_PARALLELISM := false

.PHONY: help extract federate evaluate ablate results bench $(BENCHES:%=bench-%) world test check lint clean FORCE
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.SUFFIXES:

help:
	@echo "make extract    encode every silo's images once into build/features"
	@echo "make federate   train one projector for every run of the experiment into build/runs"
	@echo "make evaluate   answer and score the benchmarks, write build/report"
	@echo "make ablate     compare strategies over scenarios and seeds: ABLATION=$(ABLATION)"
	@echo "make results    every ablation of configs/ablations into docs/results.md"
	@echo "make bench      speed and memory of cache, aggregation, training, answers and sites"
	@echo "make test       lint, types and tests: exactly what CI runs"
	@echo "make world      train the embedded default's two small models again"
	@echo "make clean      remove build/"
	@echo
	@echo "EXPERIMENT=$(EXPERIMENT) has the runs: $(RUNS)"
	@echo "PYTHON=$(PYTHON)"

.venv/.installed: pyproject.toml
	@echo "Installing into .venv (once; a few minutes, mostly torch)"
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@# Apart: asked for all at once, pip searches for minutes.
	.venv/bin/python -m pip install --quiet --editable '.[dev,flower,privacy]'
	@touch $@

# Stage one. A lost manifest asks for a check, as does a changed configuration.
lost = $(if $(wildcard $(1)),,FORCE)
SILOS := $(shell cat $(FEATURES)/silos.txt 2>/dev/null)
MANIFESTS := $(SILOS:%=$(FEATURES)/%.zarr/manifest.json)

extract: $(FEATURES)/.checked
$(FEATURES)/.checked: $(CONFIG) $(INPUTS) $(foreach file,$(MANIFESTS),$(call lost,$(file))) | $(READY)
	$(FEDCMP) extract $(CONFIG) $(PATHS)
	@touch $@
$(FEATURES)/silos.txt $(MANIFESTS): $(FEATURES)/.checked ;

# Stage two.
federate: $(RUNS:%=$(RUN_DIR)/%/.checked)
$(RUNS:%=$(RUN_DIR)/%/.checked): $(RUN_DIR)/%/.checked: $(CONFIG) $$(call config_of,$$*) $(INPUTS) \
		$(FEATURES)/silos.txt $(MANIFESTS) $$(call lost,$(RUN_DIR)/$$*/manifest.json) | $(READY)
	$(FEDCMP) federate $(call config_of,$*) $(PATHS) --set run=$*
	@touch $@
$(RUNS:%=$(RUN_DIR)/%/manifest.json): %/manifest.json: %/.checked ;

# Stage three.
evaluate: $(REPORT_DIR)/report.json
$(RUNS:%=$(SCORE_DIR)/%/.checked): $(SCORE_DIR)/%/.checked: $(RUN_DIR)/%/manifest.json $(CONFIG) $$(call config_of,$$*) \
		$(FEATURES)/silos.txt $(MANIFESTS) $$(foreach name,$(BENCHMARKS),$$(call lost,$(SCORE_DIR)/$$*/$$(name).json)) | $(READY)
	$(FEDCMP) evaluate $(call config_of,$*) $(PATHS) --set run=$*
	@touch $@
$(REPORT_DIR)/report.json: $(RUNS:%=$(SCORE_DIR)/%/.checked) $(REPORT_DIR)/runs.txt | $(READY)
	$(FEDCMP) report $(foreach run,$(RUNS),$(call config_of,$(run))) $(PATHS)
# A removed run is invisible to modification times, so the list of runs is a file of its own.
$(REPORT_DIR)/runs.txt: FORCE
	@mkdir -p $(@D); echo "$(RUNS)" | cmp -s - $@ || echo "$(RUNS)" > $@

# Ablations share caches and local training; finished runs are found done.
ablate: $(WORLDS) | $(READY)
	$(FEDCMP) ablate configs/ablations/$(ABLATION).toml
results: $(WORLDS) | $(READY)
	$(FEDCMP) ablate $(wildcard configs/ablations/*.toml) --out docs/results.md

bench: $(BENCHES:%=bench-%)
$(BENCHES:%=bench-%): bench-%: | $(READY)
	$(PYTHON) tests/bench_$*.py

world: $(READY)
	$(FEDCMP) world train

lint: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest --numprocesses auto --dist loadfile
check: test

clean:
	rm -rf build
