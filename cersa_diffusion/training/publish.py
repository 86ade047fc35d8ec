"""The model card beside a result, and the upload to the hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import make_image_grid
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training import previews
from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.result import RESULT_FILE, TrainResult
from cersa_diffusion.training.settings_file import SETTINGS_FILE

CARD_FILE, PICTURES_FILE = "README.md", "pictures.png"
# What stays at home: checkpoints with optimizer states, and the pictures on the way. Logs do, too.
NOT_UPLOADED = ["checkpoint-*", ".checkpoint-*", f"{previews.FOLDER}/*"]


def write_model_card(config: DreamBoothConfig, result: TrainResult, pictures: Sequence[Image.Image]) -> Path:
    """Writes README.md with the prompt, the settings that matter, the pictures, and how to draw with the result.

    Args:
        config: the settings.
        result: of the run.
        pictures: by the saved result; may be none.

    Returns:
        The file.
    """
    folder = Path(result.output_dir)
    data = ModelCardData(
        # Only what the hub has can be linked to.
        base_model=None if os.path.isdir(config.pretrained_model_name_or_path) else config.pretrained_model_name_or_path,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "dreambooth", config.method],
        instance_prompt=config.instance_prompt,
    )
    shown = ""
    if pictures:
        make_image_grid(list(pictures), rows=1, cols=len(pictures)).save(folder / PICTURES_FILE)
        data.widget = [{"text": config.validation_prompt, "output": {"url": PICTURES_FILE}}]
        shown = f"\n![{config.validation_prompt}]({PICTURES_FILE})\n\n`{config.validation_prompt}`, by this result.\n"
    snippet = result.snippet(config, f"./{Path(result.weights_path).relative_to(folder)}")
    size = f"{result.trainable_parameters / 1e6:.2f} M parameters, {result.file_bytes / 2**20:.2f} MiB"
    card = f"""---
{data.to_yaml()}
---

# {folder.absolute().name}

{config.pretrained_model_name_or_path} fine-tuned by DreamBooth with {config.method} on the prompt `{config.instance_prompt}`:
{size}, {result.steps} steps, learning rate {config.learning_rate}, seed {config.seed}, {config.resolution} pixels.
All settings are in `{SETTINGS_FILE}`, all figures in `{RESULT_FILE}`.
{shown}
```python
{snippet}
```
"""
    (folder / CARD_FILE).write_text(card)
    return folder / CARD_FILE


@dataclass(frozen=True)
class Publication:
    """An upload that is known to be allowed.

    Args:
        api: with the token.
        repository: owner/name.
        logging_dir: folder of the logs in that of the run.
    """

    api: HfApi
    repository: str
    logging_dir: str

    @classmethod
    def begin(cls, config: DreamBoothConfig) -> "Publication":
        """Makes the repository, before the training: what cannot be uploaded should not be found out after it.

        Raises:
            ConfigError: no token, no permission, or no hub.
        """
        api = HfApi(token=config.hub_token)
        name = config.hub_model_id or Path(config.output_dir).absolute().name
        try:
            return cls(api, api.create_repo(name, exist_ok=True).repo_id, config.logging_dir)
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"push_to_hub: repository {name} cannot be made ({reason}): log in with `hf auth login` or give hub_token"
            ) from error

    def upload(self, result: TrainResult) -> None:
        """Uploads the folder of the run without checkpoints and logs.

        Args:
            result: of the run.
        """
        self.api.upload_folder(
            repo_id=self.repository,
            folder_path=result.output_dir,
            commit_message=f"{result.method}, {result.steps} steps",
            ignore_patterns=[*NOT_UPLOADED, f"{self.logging_dir}/*"],
        )
