"""Scores of pictures: CLIPScore by two libraries, similarity to reference pictures, drift from the base, diversity among seeds.

`clipscore` and `clip_models` need the extra `score` (torchmetrics, open_clip). docs/metrics.md defines every number.
"""
