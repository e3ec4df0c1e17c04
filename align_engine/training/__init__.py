"""Training: the type of an algorithm, the engine with its verbs, and what stands around each step."""
