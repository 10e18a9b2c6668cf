"""Costs."""

from collections.abc import Mapping
from types import MappingProxyType

from layerwise.planning.costs import Costs

COUNTED: Mapping[str, Costs] = MappingProxyType({})
