"""Hooks of the site: formulas as MathML, which browsers draw by themselves."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def math(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """A fenced block ```math: each of its lines a displayed formula."""
    formulas = "".join(convert(line, display="block") for line in source.strip().splitlines())
    return f'<div class="math">{formulas}</div>'


def on_config(config: Any) -> Any:
    fences = {"custom_fences": [{"name": "math", "class": "math", "format": math}]}
    config["mdx_configs"].setdefault("pymdownx.superfences", {}).update(fences)
    return config
