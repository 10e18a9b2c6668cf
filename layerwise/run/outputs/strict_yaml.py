"""YAML from users: small, flat, one value per key, and ``2:4`` is text.

A few lines with references to each other can stand for more values than any memory holds,
so references are refused, as are values inside values beyond what a recipe needs.
"""

import re
from typing import Any

import yaml

from layerwise.errors import DataError, one_line, quoted

LONGEST = 100_000  # characters
DEEPEST = 8
TOO_DEEP = f"it has values inside values, more than {DEEPEST} deep"


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; ``where`` names its origin in the error.

    Raises
    ------
    DataError
        The text is too long, damaged, or uses what is refused.
    """
    if len(text) > LONGEST:
        message = f"cannot read {where}: it is longer than {LONGEST} characters"
        raise DataError(message)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        message = f"cannot read {where}: {one_line(error)}"
        raise DataError(message) from error


class _Loader(yaml.SafeLoader):
    """Loader that refuses references, depth and repeated keys.

    ``2:4`` is text; by default it is 124, a number to base 60.
    """

    depth = 0

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the class above declares it
        first: [
            (tag, re.compile(rf"(?!.*:){expression.pattern}", expression.flags))
            if tag.endswith((":int", ":float"))
            else (tag, expression)
            for tag, expression in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Read a bracket, unless it is too deep: looking for its key would take long."""
        if self.flow_level == DEEPEST:
            raise yaml.YAMLError(TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a value, unless it is a reference or too deep inside others."""
        if self.check_event(yaml.AliasEvent):
            message = "it has references (*name): write the values out"
            raise yaml.YAMLError(message)
        if self.depth == DEEPEST:
            raise yaml.YAMLError(TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Construct a mapping, in which every key appears once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                message = f"the key {quoted(key.value)} appears twice: keep one"
                raise yaml.YAMLError(message)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
