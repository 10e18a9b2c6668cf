"""``python -m layerwise``: the command line."""

from layerwise.cli import main

main()
