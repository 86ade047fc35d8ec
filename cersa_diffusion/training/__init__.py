"""DreamBooth training: settings, data, methods, checkpoints and the training loop."""

from cersa_diffusion.methods.table import load_result
from cersa_diffusion.training.callbacks import RunStart, StepProgress, TrainingCallback, TrainingStopped
from cersa_diffusion.training.dreambooth import train_dreambooth
from cersa_diffusion.training.run.result import TrainResult
from cersa_diffusion.training.settings.config import DreamBoothConfig, DreamBoothXLConfig
from cersa_diffusion.training.settings.presets import PRESETS

__all__ = [
    "PRESETS",
    "DreamBoothConfig",
    "DreamBoothXLConfig",
    "RunStart",
    "StepProgress",
    "TrainResult",
    "TrainingCallback",
    "TrainingStopped",
    "load_result",
    "train_dreambooth",
]
