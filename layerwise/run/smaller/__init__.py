"""Smaller models: which channels leave, how they leave, and what may hold the result."""
