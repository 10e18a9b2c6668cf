"""Checkpoints as models: opening, whole or streamed; adapters; cutting of channels."""
