# Ablations run on the embedded default; every scenario has data of its own for every seed.
SCENARIOS := content domain quantity many few smollm2 tasks
LAB_OPTIONS := --heldout-images 300 --validation-images 300
DATA_few := --scenario domain --silo-images 160
DATA_smollm2 := --scenario domain --silo-images 160
DATA_tasks := --scenario tasks --silo-images 450
data = $(or $(DATA_$(1)),--scenario $(1) --silo-images 384)
ALIGNED := $(patsubst %,build/world/%/manifest.json,$(sort $(filter align-%,$(EXPERIMENTS))))
WRITTEN := $(ALIGNED:build/world/align-%=build/world/demo-%) $(foreach scenario,$(SCENARIOS),\
	$(patsubst %,build/world/%/manifest.json,$(sort $(filter $(scenario)-%,$(EXPERIMENTS)))))
WORLDS := $(WRITTEN) $(ALIGNED)
# Where tasks differ, the connector is one that the default has trained.
PRETRAIN = $(if $(filter tasks-%,$(EXPERIMENTS)),$(MAKE) build/runs/demo/fedcmp/manifest.json EXPERIMENT=demo)

$(WRITTEN): build/world/%/manifest.json: | $(READY)
	$(FEDCMP) world write $(@D) $(call data,$(firstword $(subst -, ,$*))) --seed $(lastword $(subst -, ,$*)) $(LAB_OPTIONS)

# What is aligned is trained first, and answers questions about new scenes.
REFERENCE_OPTIONS = --set seed=$* --set run=reference
$(ALIGNED): build/world/align-%/manifest.json: build/world/demo-%/manifest.json | $(READY)
	$(FEDCMP) extract configs/scenarios/demo.toml $(REFERENCE_OPTIONS)
	$(FEDCMP) federate configs/scenarios/demo.toml $(REFERENCE_OPTIONS)
	$(FEDCMP) world prefer configs/scenarios/demo.toml $(@D) $(REFERENCE_OPTIONS) --seed $*
