"""Backends: modules with primitives on a tile of logits, `forward`, `backward` and `peaks`, and a predicate `why_not`.

One may have `exponentials` too, and then plain logits take the schedules of exponentials.py. A backend knows no loss
and no schedule, and imports no other backend.
"""
