"""The model-level run: calibrate, prune block by block, journal, save, verify."""
