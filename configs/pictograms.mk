# The study's data and models are downloaded once.
PICTOGRAMS := build/pictograms/manifest.json
INPUTS := $(PICTOGRAMS)

$(PICTOGRAMS): | $(READY)
	$(FEDCMP) world pictograms $(@D)
