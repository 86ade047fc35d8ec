"""The result of a run: its files, its figures, and the text about it."""

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
# A plan that is further from the measured peak than this share of it has a fault that is worth finding. The bytes are what
# libraries load late in the memory of a process, which is much beside a small model.
PLAN_TOLERANCE, PLAN_TOLERANCE_BYTES = 0.1, 200 * 2**20


def size_on_disk(weights_path: Path, components: Sequence[str]) -> int:
    """Bytes of the weights that a run saved.

    Args:
        weights_path: a file, or the folder of a pipeline; of a pipeline only the trained components count.
        components: names of the trained components.
    """
    if weights_path.is_file():
        return weights_path.stat().st_size
    return sum(file.stat().st_size for name in components for file in (weights_path / name).glob("*.safetensors"))


def beside_plan(measured: int, planned: int | None) -> str:
    """A measured peak in MiB and, if it was planned, by how much the plan was off.

    Args:
        measured: bytes.
        planned: bytes, or None.
    """
    text = f"{measured / 2**20:.0f} MiB"
    if planned is None:
        return text
    difference = planned - measured
    is_finding = abs(difference) > max(PLAN_TOLERANCE * measured, PLAN_TOLERANCE_BYTES)
    return f"{text} (planned {planned / 2**20:.0f}, {difference / measured:+.0%}{': please report it' if is_finding else ''})"


@dataclass(frozen=True)
class TrainResult:
    """The files and figures of a finished run.

    Attributes:
        method: a key of `METHODS`.
        output_dir: folder of the run.
        weights_path: file or folder that `load_result` opens.
        steps: optimizer steps of the whole training.
        seconds: time of the training steps of this call (a resumed run counts only its own steps).
        decompose_seconds: time of preparing the models for the method.
        loss: mean loss over the last tenth of the steps of this call; None if all steps had been done before.
        trainable_parameters: number of trained values.
        weight_bytes, gradient_bytes, optimizer_bytes: tensors of the trained components during training, without activations.
        peak_memory_bytes: peak of the steps: on a GPU the most that was allocated, otherwise the most that the process held.
        pictures_per_second: pictures of the subject and the class, over all processes.
        file_bytes: size of the result on disk (for full fine-tuning: of the trained components).
        truncation: the cost of truncation before the first step; None if no components are dropped.
        preparing_peak_bytes, drawing_peak_bytes: as `peak_memory_bytes`, for preparing the models and for the previews; None if
            there were none.
        planned_peak_bytes, planned_preparing_bytes: what the plan expected for `peak_memory_bytes` and `preparing_peak_bytes`.
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
    preparing_peak_bytes: int | None = None
    drawing_peak_bytes: int | None = None
    planned_peak_bytes: int | None = None
    planned_preparing_bytes: int | None = None

    def write(self) -> None:
        """Writes the result file beside the weights; this file marks the run as finished."""
        with atomic_write(Path(self.output_dir) / RESULT_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, output_dir: Path) -> "TrainResult":
        """The result of a finished run.

        Args:
            output_dir: folder of the run.

        Raises:
            ConfigError: the run has no result file, or the file cannot be read.
        """
        path = output_dir / RESULT_FILE
        try:
            values = json.loads(path.read_text())
            truncation = values.pop("truncation")
            return cls(**values, truncation=truncation and TruncationCost(**truncation))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: cannot be read as the result of a run ({error})") from error

    def snippet(self, config: DreamBoothConfig, path: str | None = None) -> str:
        """Lines of Python that draw with the result.

        Args:
            config: the settings of the run.
            path: the path of the weights; default: the path they were written to.
        """
        pipeline, base = config.family.pipeline_class.__name__, config.pretrained_model_name_or_path
        options = "".join(f', {name}="{getattr(config, name)}"' for name in ("revision", "variant") if getattr(config, name))
        opening = METHODS[config.method].opening
        opening = opening.format(pipeline=pipeline, base=base, options=options, path=path or self.weights_path)
        return (
            f"import torch, cersa_diffusion\nfrom diffusers import {pipeline}\n{opening}\n"
            f'pipe("{config.instance_prompt}", generator=torch.Generator().manual_seed(0)).images[0].save("picture.png")'
        )

    def summary(self, config: DreamBoothConfig) -> str:
        """The text that is printed at the end of a run with these settings."""
        tensors = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        snippet = self.snippet(config).replace("\n", "\n    ")
        peaks = {
            "preparing": (self.preparing_peak_bytes, self.planned_preparing_bytes),
            "steps": (self.peak_memory_bytes, self.planned_peak_bytes),
            "previews": (self.drawing_peak_bytes, None),
        }
        shown = ", ".join(f"{phase} {beside_plan(*sizes)}" for phase, sizes in peaks.items() if sizes[0])
        loss = "" if self.loss is None else f", loss {self.loss:.4f} (mean over the last tenth of the steps)"
        return f"""
{self.method}: {self.steps} steps in {self.seconds:.0f} s{loss}
trained {self.trainable_parameters / 1e6:.2f} M parameters; weights, gradients and optimizer {tensors / 2**20:.1f} MiB
peak memory: {shown}
result  {self.weights_path} ({self.file_bytes / 2**20:.2f} MiB)

To generate with it:
    {snippet}"""
