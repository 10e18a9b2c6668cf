"""Checkpoints as bytes: shards, masks and JSON; validated, hashed, written atomically."""
