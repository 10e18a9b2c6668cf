"""Measurements behind the tables of the documentation; not collected as tests."""
