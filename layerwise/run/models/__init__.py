"""Checkpoints as models: opened whole or streamed, adapters found, channels cut."""
