"""A run, block by block: selection, method, moments, solutions and stored blocks."""
