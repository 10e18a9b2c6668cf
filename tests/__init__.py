"""Tests of layerwise; a package, so that references and problems are imported by name."""
