# Ablations run on the embedded default; every scenario has data of its own for every seed.
SCENARIOS := content domain quantity many
LAB_OPTIONS := --silo-images 384 --heldout-images 300 --validation-images 300
WORLDS := $(foreach scenario,$(SCENARIOS),\
	$(patsubst %,build/world/%/manifest.json,$(sort $(filter $(scenario)-%,$(EXPERIMENTS)))))

$(WORLDS): build/world/%/manifest.json: | $(READY)
	$(FEDCMP) world write $(@D) --scenario $(firstword $(subst -, ,$*)) --seed $(lastword $(subst -, ,$*)) $(LAB_OPTIONS)
