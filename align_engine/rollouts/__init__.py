"""Rollouts: completions of prompts, what scores them, and the advantages that follow."""
