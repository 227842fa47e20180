# Nine silos' data, and the connector that the embedded default's silos have pre-trained.
TASKS_WORLD := build/world/tasks/manifest.json
PRETRAINED := build/runs/demo/fedcmp/manifest.json
INPUTS := $(TASKS_WORLD) $(PRETRAINED) $(wildcard pipeline/world/weights/*/*)

$(TASKS_WORLD): | $(READY)
	$(FEDCMP) world write $(@D) --scenario tasks --silo-images 450 --validation-images 150

$(PRETRAINED): | $(READY)
	$(MAKE) build/runs/demo/fedcmp/manifest.json EXPERIMENT=demo
