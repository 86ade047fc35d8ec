"""The model card of a result, and the upload to the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import make_image_grid
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import is_local
from cersa_diffusion.text import one_line
from cersa_diffusion.training.publish.public_files import public_result, public_settings, public_weights
from cersa_diffusion.training.run.result import RESULT_FILE, TrainResult
from cersa_diffusion.training.settings.config import DreamBoothConfig
from cersa_diffusion.training.settings.file import SETTINGS_FILE, settings_text

CARD_FILE, PICTURES_FILE = "README.md", "pictures.png"


def write_model_card(config: DreamBoothConfig, result: TrainResult, pictures: Sequence[Image.Image]) -> Path:
    """Writes README.md with the prompt, the main settings, the pictures and the code to draw with the result; returns its path.

    The card is public: it names a base in a local folder by the name of the folder, not by its path.

    Args:
        config: the settings.
        result: the result of the run.
        pictures: the pictures by the saved result; may be empty.
    """
    folder, base = Path(result.output_dir), config.pretrained_model_name_or_path
    public = public_settings(config)
    data = ModelCardData(
        # The card can only link to a base on the hub.
        base_model=None if is_local(base) else base,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "dreambooth", config.method],
        instance_prompt=config.instance_prompt,
    )
    pictures_text = ""
    if pictures:
        make_image_grid(list(pictures), rows=1, cols=len(pictures)).save(folder / PICTURES_FILE)
        data.widget = [{"text": config.validation_prompt, "output": {"url": PICTURES_FILE}}]
        pictures_text = f"\n![{config.validation_prompt}]({PICTURES_FILE})\n\n`{config.validation_prompt}`, by this result.\n"
    snippet = result.snippet(public, f"./{Path(result.weights_path).relative_to(folder)}")
    size = f"{result.trainable_parameters / 1e6:.2f} M parameters, {result.file_bytes / 2**20:.2f} MiB"
    card = f"""---
{data.to_yaml()}
---

# {folder.absolute().name}

{public.pretrained_model_name_or_path} fine-tuned by DreamBooth with {config.method} on the prompt `{config.instance_prompt}`:
{size}, {result.steps} steps, learning rate {config.learning_rate}, seed {config.seed}, {config.resolution} pixels.
All settings are in `{SETTINGS_FILE}`, all figures in `{RESULT_FILE}`.
{pictures_text}
```python
{snippet}
```
"""
    (folder / CARD_FILE).write_text(card)
    return folder / CARD_FILE


@dataclass(frozen=True)
class Publication:
    """An upload that the hub has allowed.

    Args:
        api: the client of the hub, with the token.
        repository: owner/name.
        config: the settings of the run.
    """

    api: HfApi
    repository: str
    config: DreamBoothConfig

    @classmethod
    def begin(cls, config: DreamBoothConfig) -> "Publication":
        """Creates the repository before the training, so that a missing permission is an error before it, not after it.

        Raises:
            ConfigError: there is no token or no permission, or the hub cannot be reached.
        """
        api = HfApi(token=config.hub_token)
        name = config.hub_model_id or Path(config.output_dir).absolute().name
        try:
            return cls(api, api.create_repo(name, exist_ok=True).repo_id, config)
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError(
                f"push_to_hub: repository {name} cannot be created ({reason}): log in with `hf auth login` or set hub_token"
            ) from error

    def upload(self, result: TrainResult) -> None:
        """Uploads only the weights, the card with its pictures, the settings and the figures.

        The folder of the run may hold pictures of the subject, and its files name folders of this machine: neither is uploaded.

        Args:
            result: the result of the run; its card must be written.
        """
        self.api.create_commit(
            repo_id=self.repository,
            operations=[CommitOperationAdd(name, content) for name, content in self._files(result).items()],
            commit_message=f"{result.method}, {result.steps} steps",
        )

    def _files(self, result: TrainResult) -> dict[str, Path | bytes]:
        """Name in the repository -> the file, or new content if the file itself names folders of this machine."""
        folder = Path(result.output_dir)
        card = folder / CARD_FILE
        pictures = {PICTURES_FILE: folder / PICTURES_FILE} if f"]({PICTURES_FILE})" in card.read_text() else {}
        return {
            CARD_FILE: card,
            **pictures,
            SETTINGS_FILE: settings_text(public_settings(self.config)).encode(),
            RESULT_FILE: public_result(result).encode(),
            **public_weights(result),
        }
