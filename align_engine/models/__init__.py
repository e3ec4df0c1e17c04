"""Models: loaded, with heads of scores, and asked for log-probs."""
