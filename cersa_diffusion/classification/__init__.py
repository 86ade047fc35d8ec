"""Fine-tuning transformers' classifiers: pictures (ViT) and sentences (GLUE), on transformers' Trainer."""

from cersa_diffusion.classification.result import load_classifier
from cersa_diffusion.classification.run import TrainReport, train_classifier
from cersa_diffusion.classification.settings import ClassifierSettings, ImageData, RunArguments, TextData

__all__ = ["ClassifierSettings", "ImageData", "RunArguments", "TextData", "TrainReport", "load_classifier", "train_classifier"]
