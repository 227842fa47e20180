# Ablations run on the embedded default; every scenario has data of its own for every seed.
SEEDS := $(sort $(shell sed -n 's/^seeds *= *\[\(.*\)\].*/\1/p' configs/ablations/*.toml | tr ',' ' '))
SCENARIOS := content domain quantity many
LAB_OPTIONS := --silo-images 384 --heldout-images 300 --validation-images 300
WORLDS := $(foreach scenario,$(SCENARIOS),$(SEEDS:%=build/world/$(scenario)-%/manifest.json))

$(WORLDS): build/world/%/manifest.json: | $(READY)
	$(FEDCMP) world write $(@D) --scenario $(firstword $(subst -, ,$*)) --seed $(lastword $(subst -, ,$*)) $(LAB_OPTIONS)
