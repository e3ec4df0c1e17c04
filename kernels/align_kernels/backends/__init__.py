"""Backends: modules with two primitives, `forward` and `backward`, on a tile of logits, and a predicate `why_not`.

A backend knows no loss and no schedule, and imports no other backend.
"""
