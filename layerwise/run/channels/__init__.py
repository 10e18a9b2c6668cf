"""Which channels are removed: their scores, the widths of all blocks, the allocation."""
