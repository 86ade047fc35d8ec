"""Fine-tuning of transformers' classifiers for pictures (ViT) and sentences (GLUE), with transformers' Trainer."""

from cersa_diffusion.classification.result import load_classifier
from cersa_diffusion.classification.run import TrainReport, train_classifier
from cersa_diffusion.classification.settings import ClassifierSettings, ImageData, RunArguments, TextData

__all__ = ["ClassifierSettings", "ImageData", "RunArguments", "TextData", "TrainReport", "load_classifier", "train_classifier"]
