"""DreamBooth training: settings, data, methods, checkpoints and the loop."""

from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.dreambooth import TrainResult, train_dreambooth
from cersa_diffusion.training.methods import load_result

__all__ = ["DreamBoothConfig", "TrainResult", "load_result", "train_dreambooth"]
