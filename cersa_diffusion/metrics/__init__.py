"""Scores for pictures: CLIPScore by two libraries, similarity to reference pictures."""
