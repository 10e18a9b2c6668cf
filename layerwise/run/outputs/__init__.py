"""The output folder of a run: recipe, manifest, model card, and its verification."""
