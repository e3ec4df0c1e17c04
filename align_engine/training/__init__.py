"""Training: the type of an algorithm, the engine with its verbs, the loop, and what stands around each step."""
