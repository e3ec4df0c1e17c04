"""Reports: of a run, of a model's answers, of this machine."""
