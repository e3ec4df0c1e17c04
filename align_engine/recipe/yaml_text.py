"""YAML in which every scalar is text: `no`, `1e-4`, `2026-11-28` and `null` mean what the reader's fields make of them.

Anchors, aliases and merges (`<<`) are those of YAML. A key that stands twice is an error, and so is a tag (`!!int`).
"""

from __future__ import annotations

import re
from typing import Any

from yaml import MappingNode, SafeLoader, YAMLError
from yaml.composer import ComposerError

TAG = "tag:yaml.org,2002:"


class TextLoader(SafeLoader):
    """For yaml.load."""

    yaml_implicit_resolvers = {"<": [(f"{TAG}merge", re.compile("<<$"))]}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: SafeLoader.yaml_constructors[tag] for tag in (f"{TAG}map", f"{TAG}seq", f"{TAG}str", None)
    }

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """A mapping with keys of text, each once."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise ComposerError(None, None, "a key is not text", key.start_mark)
            if key.value in seen:
                raise ComposerError(None, None, f"key {key.value!r:.80} stands twice", key.start_mark)
            seen.add(key.value)
        return node


def sentence(error: YAMLError) -> str:
    """What is wrong, and in which line, without the excerpt that YAML prints."""
    if (mark := getattr(error, "problem_mark", None)) is None:
        return str(error).splitlines()[0]
    problem = ": ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return f"line {mark.line + 1}: {problem}"
