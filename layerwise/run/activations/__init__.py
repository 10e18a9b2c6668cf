"""Hidden states between the blocks: captured, stored, passed through a block."""
