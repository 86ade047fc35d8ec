"""Fair comparison of methods: tuned learning rates, several seeds, separate test prompts; it can be resumed and ends in one report."""
