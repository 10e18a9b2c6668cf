"""The folder that a run leaves: recipe, manifest, model card, and the checks of it."""
