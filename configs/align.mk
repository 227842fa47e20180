# Preferences between answers of the run that is aligned.
REFERENCE := build/runs/demo/fedavg/manifest.json
PREFERENCES := build/world/align/manifest.json
INPUTS := $(PREFERENCES) $(REFERENCE) $(wildcard pipeline/world/weights/*/*)

$(REFERENCE): | $(READY)
	$(MAKE) $@ EXPERIMENT=demo
$(PREFERENCES): $(REFERENCE) | $(READY)
	$(FEDCMP) world prefer configs/demo/fedavg.toml $(@D) $(PREFER_OPTIONS)
