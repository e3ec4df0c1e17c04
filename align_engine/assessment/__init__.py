"""People, diagnosis and proof: do you need it, which method, and what did it buy.

A command NAME is a tree of settings in `sections` (`required` says which of them must be given), an entry of the table
below (and of `algorithms.TOOLS`, so that no method takes its name), and a module NAME with `run(settings)`.
"""

from __future__ import annotations

import importlib
from typing import Any

from align_engine.assessment.diagnose_settings import DiagnoseRecipe
from align_engine.assessment.eval_settings import EvalRecipe
from align_engine.assessment.rate.sections import RateRecipe, RatingsRecipe
from align_engine.assessment.report_sections import ReportRecipe, SamplesRecipe
from align_engine.assessment.sections import AdviseRecipe, ChatRecipe, MergeRecipe
from align_engine.errors import BadInput
from align_engine.recipe import REQUIRED, Settings

EXTRA: dict[str, str] = {  # packages of the extra `eval`, by the name of their module
    "lm_eval": "lm-eval", "openai": "openai", "scipy": "scipy", "sklearn": "scikit-learn",
    "sentence_transformers": "sentence-transformers",
}  # fmt: skip
RATE = ("fastapi", "uvicorn", "krippendorff", "choix", "markdown_it")  # of the extra `rate`
ASSESSMENT: dict[str, type[Settings]] = {
    "advise": AdviseRecipe,
    "chat": ChatRecipe,
    "merge": MergeRecipe,
    "diagnose": DiagnoseRecipe,
    "eval": EvalRecipe,
    "rate": RateRecipe,
    "ratings": RatingsRecipe,
    "samples": SamplesRecipe,
    "report": ReportRecipe,
}


def run(name: str, settings: Any) -> None:
    """One command of this room.

    Raises:
        BadInput: settings that cannot be used, before anything is read. What the command itself raises.
    """
    from align_engine.recipe import check, flat

    settings = check(settings, getattr(settings, "required", REQUIRED))
    if "output_dir" in flat(settings):
        from align_engine.inputs import check_outputs

        check_outputs(settings)
    try:
        importlib.import_module(f"align_engine.assessment.{name}").run(settings)
    except ModuleNotFoundError as error:
        if error.name in RATE:
            raise BadInput(f"align {name} needs {error.name}: pip install 'align-engine[rate]'") from error
        if error.name not in EXTRA:
            raise
        raise BadInput(f"align {name} needs {EXTRA[error.name]}: pip install 'align-engine[eval]'") from error
