"""Hidden states on their way through the blocks: captured, kept, passed on."""
