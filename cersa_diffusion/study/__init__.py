"""Comparing methods fairly: tuned learning rates, seeds, other prompts for the scores, resumable, one report."""
