"""DreamBooth training: settings, data, methods, checkpoints and the loop."""

from cersa_diffusion.training.callbacks import RunStart, StepProgress, TrainingCallback, TrainingStopped
from cersa_diffusion.training.config import DreamBoothConfig, DreamBoothXLConfig
from cersa_diffusion.training.dreambooth import train_dreambooth
from cersa_diffusion.training.methods import load_result
from cersa_diffusion.training.presets import PRESETS
from cersa_diffusion.training.result import TrainResult

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
