"""The folder of a run: a journal while it goes on, then a manifest, and checks of it."""
