"""`align rate`: a web page where people rate answers, its project in SQLite, and what they said as training data."""

from __future__ import annotations

from align_engine.assessment.rate.sections import RateRecipe


def run(settings: RateRecipe) -> None:
    """The command: make the project or go on with it, and serve it until it is stopped.

    Raises:
        BadInput: data, a project or an address that cannot be used, before anything is served.
    """
    from align_engine.assessment.rate.serve import serve

    serve(settings)
