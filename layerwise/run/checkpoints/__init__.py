"""Checkpoints: validated, read in parts, turned into models, copied with changes."""
