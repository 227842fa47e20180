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
# PYTHON=... or an active environment with torch is used as it is; otherwise .venv is made and installed into.
ifdef PYTHON
else ifneq ($(and $(VIRTUAL_ENV),$(wildcard $(VIRTUAL_ENV)/lib/python*/site-packages/torch)),)
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
READY := .venv/.installed
TOOLS := .venv/.tools
endif
FEDCMP := $(PYTHON) -m fedcmp
# The experiment has the name of its file, also where that extends another experiment's.
NAMED := --set 'experiment="$(EXPERIMENT)"'

ABLATION ?= methods
BENCHES := cache aggregation training generation sites sweep gpu

export TOKENIZERS_PARALLELISM := false

OTHERS := help align study ablate results bench $(BENCHES:%=bench-%) world cli-reference test test-newest test-oldest check lint constraints clean
.PHONY: extract federate evaluate $(OTHERS) FORCE
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.SUFFIXES:

help:
	@echo "make extract      encode every silo's images once into build/features"
	@echo "make federate     train one projector for every run of the experiment into build/runs"
	@echo "make evaluate     answer and score the benchmarks, write build/report"
	@echo "make align        align the embedded default with what its silos prefer (docs/mor.md)"
	@echo "make study        the three stages on real weights and pictograms, downloaded once"
	@echo "make ablate       compare strategies over scenarios and seeds: ABLATION=$(ABLATION)"
	@echo "make results      every ablation of configs/ablations into docs/results.md"
	@echo "make bench        speed and memory of cache, aggregation, training, answers, sites and sweeps"
	@echo "make test         lint, types and tests: exactly what CI runs"
	@echo "make test-newest  tests with the newest releases of everything, warnings are errors"
	@echo "make test-oldest  tests with the oldest releases that pyproject.toml allows"
	@echo "make constraints  pin today's newest releases in constraints.txt"
	@echo "make world        train the embedded default's two small models again"
	@echo "make cli-reference  write docs/cli.md and docs/keys.md from the program itself"
	@echo "make clean        remove build/"
	@echo
	@echo "EXPERIMENT=$(EXPERIMENT) has the runs:" \
		$(basename $(notdir $(or $(wildcard configs/$(EXPERIMENT)/*.toml),$(CONFIG))))
	@echo "PYTHON=$(PYTHON)"

# What stands in a TOML file is asked of the program. make reads the answer, and itself again if that changed.
build/make/%.mk: configs/%.toml FORCE | $(READY)
	@mkdir -p $(@D)
	@$(FEDCMP) show $< $(if $(findstring ablations/,$<),,$(NAMED)) --make > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

GOALS := $(or $(MAKECMDGOALS),help)
ifneq ($(filter-out $(OTHERS),$(GOALS)),)
FACTS := build/make/$(EXPERIMENT).mk
include $(FACTS)
endif
ifneq ($(filter ablate results,$(GOALS)),)
include $(patsubst configs/%.toml,build/make/%.mk,$(if $(filter results,$(GOALS)),$(wildcard configs/ablations/*.toml)) \
	$(if $(filter ablate,$(GOALS)),configs/ablations/$(ABLATION).toml))
endif

# configs/<experiment>.mk may say what the experiment is made from (INPUTS) and how that is made.
# Without one of its own nobody knows when images, texts or models change, so every make checks them.
-include $(FILES:.toml=.mk) configs/ablations.mk
ifeq ($(wildcard configs/$(EXPERIMENT).mk),)
INPUTS += FORCE
endif

# A new version may mean something else by the same file, so it asks for a check too.
PROGRAM := $(shell find -L pipeline extract federate evaluate -name '*.py')

# Stage one. A lost manifest asks for a check, as does a changed configuration.
lost = $(if $(wildcard $(1)),,FORCE)
MANIFESTS := $(SILOS:%=$(FEATURES)/%.zarr/manifest.json)

extract: $(FEATURES)/.checked
$(FEATURES)/.checked: $(FILES) $(PROGRAM) $(INPUTS) $(foreach file,$(MANIFESTS),$(call lost,$(file))) | $(READY)
	$(FEDCMP) extract $(CONFIG) $(NAMED)
	@touch $@
$(MANIFESTS): $(FEATURES)/.checked ;

# Stage two.
federate: $(RUNS:%=$(RUN_DIR)/%/.checked)
$(RUNS:%=$(RUN_DIR)/%/.checked): $(RUN_DIR)/%/.checked: $$(files_$$*) $(PROGRAM) $(INPUTS) $(MANIFESTS) \
		$$(call lost,$(RUN_DIR)/$$*/manifest.json) | $(READY)
	$(FEDCMP) federate $(config_$*) $(NAMED)
	@touch $@
$(RUNS:%=$(RUN_DIR)/%/manifest.json): %/manifest.json: %/.checked ;

# Stage three.
evaluate: $(REPORT_DIR)/report.json
$(RUNS:%=$(SCORE_DIR)/%/.checked): $(SCORE_DIR)/%/.checked: $(RUN_DIR)/%/manifest.json $$(files_$$*) $(PROGRAM) $(MANIFESTS) \
		$$(foreach name,$$(benchmarks_$$*),$$(call lost,$(SCORE_DIR)/$$*/$$(name).json)) | $(READY)
	$(FEDCMP) evaluate $(config_$*) $(NAMED)
	@touch $@
# $(FACTS) tells a removed run, which modification times do not.
$(REPORT_DIR)/report.json: $(RUNS:%=$(SCORE_DIR)/%/.checked) $(FACTS) $(call lost,$(REPORT_DIR)/report.html) | $(READY)
	$(FEDCMP) report $(foreach run,$(RUNS),$(config_$(run))) $(NAMED)

align:
	$(MAKE) extract federate evaluate EXPERIMENT=align
study:
	$(MAKE) extract federate evaluate EXPERIMENT=pictograms

# Ablations share caches and local training; finished runs are found done.
ablate: $(WORLDS) | $(READY)
	$(PRETRAIN)
	$(FEDCMP) ablate configs/ablations/$(ABLATION).toml
results: $(WORLDS) | $(READY)
	$(PRETRAIN)
	$(FEDCMP) ablate $(wildcard configs/ablations/*.toml) --out docs/results.md

bench: $(BENCHES:%=bench-%)
$(BENCHES:%=bench-%): bench-%: | $(READY)
	$(PYTHON) tests/bench_$*.py

world: $(READY)
	$(FEDCMP) world train

cli-reference: | $(READY)
	$(PYTHON) tests/cli_reference.py
	$(PYTHON) tests/key_reference.py

lint: $(TOOLS)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
test: lint
	$(PYTHON) $(PYTEST)
check: test

# Installing. uv takes a fraction of pip's time; where it cannot be had, pip does the same. Bytecode, as pip writes it:
# compiling torch and transformers at every start would take seconds where the environment cannot be written to.
install = .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python -c constraints.txt -e '$(1)' || \
	{ echo "uv is not available or failed; pip installs the same, which takes longer"; \
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '$(1)'; }
EVERYTHING := .[dev,flower,privacy]

.venv/bin/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, and python3 is %d.%d" % sys.version_info[:2])'
	python3 -m venv .venv
.venv/bin/uv: | .venv/bin/python
	.venv/bin/python -m pip install --quiet -c constraints.txt uv
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (once; a few minutes, mostly torch)"
	@test -x .venv/bin/uv || .venv/bin/python -m pip install --quiet -c constraints.txt uv || true
	@$(call install,.)
	@touch $@
.venv/.tools: .venv/.installed
	@echo "Installing what tests need"
	@$(call install,$(EVERYTHING))
	@touch $@

# The newest releases of everything but HELD, which every machine that we test on can install, for all Pythons
# and systems. CUDA's packages are left out: each build of torch pins its own.
HELD ?= torch==2.14.1 torchvision==0.29.1
constraints: | .venv/bin/uv
	@mkdir -p build
	@printf '%s\n' $(HELD:%='%') > build/held.txt
	@.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade --no-annotate --no-header \
		-c build/held.txt --extra dev --extra flower --extra privacy pyproject.toml -o build/constraints.txt
	@{ echo "# Tested releases, for pip and uv. Written by: make constraints"; \
		grep -v -E '^(nvidia-|cuda-|triton)' build/constraints.txt; } > constraints.txt

# Each in an environment of its own.
test-newest: OPTIONS := -W error
test-oldest: RELEASE := 3.11
test-oldest: RESOLUTION := --resolution lowest-direct
test-newest test-oldest: test-%: | .venv/bin/uv
	.venv/bin/uv venv --quiet --clear --python $(or $(RELEASE),.venv/bin/python) .venv-$*
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv-$*/bin/python $(RESOLUTION) -e '$(EVERYTHING)'
	.venv-$*/bin/python $(PYTEST) $(OPTIONS)

clean:
	rm -rf build
