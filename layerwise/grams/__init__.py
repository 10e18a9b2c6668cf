"""Calibrate once, solve many times: stored layer problems, and runs without the model."""
