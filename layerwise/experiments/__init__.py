"""Experiments on the packaged models: prune, measure, keep the figures, compare."""
