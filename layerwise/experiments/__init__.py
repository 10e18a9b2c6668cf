"""Experiments on the packaged models: prune, measure, store the results, compare."""
