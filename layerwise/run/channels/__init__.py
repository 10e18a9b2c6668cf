"""Removal of channels: their scores, the widths of all blocks, the allocation."""
