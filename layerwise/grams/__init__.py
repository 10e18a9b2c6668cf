"""Calibrate once, solve many: layer problems on the disk, and runs without the model."""
