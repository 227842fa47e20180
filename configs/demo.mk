# The embedded default writes its own data.
WORLD := build/world/manifest.json
INPUTS := $(WORLD) $(wildcard pipeline/world/weights/*/*)

$(WORLD): | $(READY)
	$(FEDCMP) world write $(@D) $(WORLD_OPTIONS)
