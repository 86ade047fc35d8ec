"""The paper's analyses: spectra, memory, speed, ablations, subspaces, forgetting, intruder dimensions. See docs/analysis.md."""
