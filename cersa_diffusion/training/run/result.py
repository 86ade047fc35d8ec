"""What a run made and what it took, in numbers and in words."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import atomic_write
from cersa_diffusion.methods.table import METHODS
from cersa_diffusion.training.run.truncation import TruncationCost
from cersa_diffusion.training.settings.config import DreamBoothConfig

RESULT_FILE = "result.json"


def size_on_disk(weights_path: Path, components: Sequence[str]) -> int:
    """Bytes of the result of a run.

    Args:
        weights_path: a file, or the folder of a pipeline, of which the trained components are counted.
        components: their names.
    """
    if weights_path.is_file():
        return weights_path.stat().st_size
    return sum(file.stat().st_size for name in components for file in (weights_path / name).glob("*.safetensors"))


@dataclass(frozen=True)
class TrainResult:
    """What a run made and what it took.

    Attributes:
        method: a key of `METHODS`.
        output_dir: folder of the run.
        weights_path: file or folder that `load_result` opens.
        steps: optimizer steps done in all.
        seconds: time spent in training steps by this call (a resumed run counts its own part).
        decompose_seconds: time spent preparing the models for the method.
        loss: mean loss of the last tenth of the steps of this call; None if all had been done before.
        trainable_parameters: numbers that are trained.
        weight_bytes, gradient_bytes, optimizer_bytes: tensors of the trained components while training, without activations.
        peak_memory_bytes: on a GPU the most that was allocated, else the most that the process has held.
        pictures_per_second: of the subject and the class, over all processes.
        file_bytes: size of the result on disk (for full fine-tuning: of the trained components).
        truncation: what dropping components cost before the first step; None where nothing is dropped.
    """

    method: str
    output_dir: str
    weights_path: str
    steps: int
    seconds: float
    decompose_seconds: float
    loss: float | None
    trainable_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_memory_bytes: int
    pictures_per_second: float
    file_bytes: int
    truncation: TruncationCost | None

    def write(self) -> None:
        """Writes the result beside the weights; its presence says that the run is finished."""
        with atomic_write(Path(self.output_dir) / RESULT_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, output_dir: Path) -> "TrainResult":
        """The result of a finished run.

        Args:
            output_dir: folder of the run.

        Raises:
            ConfigError: the run has no result, or it cannot be read.
        """
        path = output_dir / RESULT_FILE
        try:
            values = json.loads(path.read_text())
            truncation = values.pop("truncation")
            return cls(**values, truncation=truncation and TruncationCost(**truncation))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: not the result of a run that can be read ({error})") from error

    def snippet(self, config: DreamBoothConfig, path: str | None = None) -> str:
        """Lines of Python that draw with the result.

        Args:
            config: the settings of the run.
            path: where the weights are; default: where they were written.
        """
        family = config.family
        options = [f', {name}="{getattr(config, name)}"' for name in ("revision", "variant") if getattr(config, name)]
        opening = METHODS[config.method].opening.format(
            pipeline=family.pipeline_class.__name__,
            base=config.pretrained_model_name_or_path,
            options="".join(options),
            path=path or self.weights_path,
        )
        return (
            f"import torch, cersa_diffusion\nfrom diffusers import {family.pipeline_class.__name__}\n{opening}\n"
            f'pipe("{config.instance_prompt}", generator=torch.Generator().manual_seed(0)).images[0].save("picture.png")'
        )

    def summary(self, config: DreamBoothConfig) -> str:
        """What is printed at the end.

        Args:
            config: the settings of the run.
        """
        tensors = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        snippet = self.snippet(config).replace("\n", "\n    ")
        loss = "" if self.loss is None else f", loss {self.loss:.4f} (mean of the last tenth)"
        return f"""
{self.method}: {self.steps} steps in {self.seconds:.0f} s{loss}
trained {self.trainable_parameters / 1e6:.2f} M parameters; weights, gradients and optimizer {tensors / 2**20:.1f} MiB
result  {self.weights_path} ({self.file_bytes / 2**20:.2f} MiB)

To generate with it:
    {snippet}"""
