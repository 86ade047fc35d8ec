"""Fair comparison of methods: tuned learning rates, several seeds, separate test prompts, resumable, one report."""
