# Ablations run on the embedded default; every scenario has data of its own for every seed.
SCENARIOS := content domain quantity many few smollm2
LAB_OPTIONS := --heldout-images 300 --validation-images 300
DATA_few := --scenario domain --silo-images 160
DATA_smollm2 := --scenario domain --silo-images 160
data = $(or $(DATA_$(1)),--scenario $(1) --silo-images 384)
WORLDS := $(foreach scenario,$(SCENARIOS),\
	$(patsubst %,build/world/%/manifest.json,$(sort $(filter $(scenario)-%,$(EXPERIMENTS)))))

$(WORLDS): build/world/%/manifest.json: | $(READY)
	$(FEDCMP) world write $(@D) $(call data,$(firstword $(subst -, ,$*))) --seed $(lastword $(subst -, ,$*)) $(LAB_OPTIONS)
