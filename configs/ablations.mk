# Ablations run on the embedded default; every scenario has data of its own for every seed.
SCENARIOS := content domain quantity many few smollm2 tasks
LAB_OPTIONS := --heldout-images 300 --validation-images 300
DATA_few := --scenario domain --silo-images 160
DATA_smollm2 := --scenario domain --silo-images 160
DATA_tasks := --scenario tasks --silo-images 450
data = $(or $(DATA_$(1)),--scenario $(1) --silo-images 384)
WORLDS := $(foreach scenario,$(SCENARIOS),\
	$(patsubst %,build/world/%/manifest.json,$(sort $(filter $(scenario)-%,$(EXPERIMENTS)))))
# Where tasks differ, the connector is one that the default has trained.
PRETRAIN = $(if $(filter tasks-%,$(EXPERIMENTS)),$(MAKE) build/runs/demo/fedcmp/manifest.json EXPERIMENT=demo)

$(WORLDS): build/world/%/manifest.json: | $(READY)
	$(FEDCMP) world write $(@D) $(call data,$(firstword $(subst -, ,$*))) --seed $(lastword $(subst -, ,$*)) $(LAB_OPTIONS)
