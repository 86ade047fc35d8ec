"""CLIPScore (Hessel et al., arXiv 2104.08718), weight * max(cos(picture, prompt), 0), by torchmetrics or by open_clip."""

from collections.abc import Sequence

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.metrics.clip_models import OpenClipModel, TransformersClip
from cersa_diffusion.private_names import CLIP_SCORE_UPDATE

try:
    # The public functions of torchmetrics clamp and return the mean of a batch; CLIPScore clamps the score of each picture.
    clip_score_update = CLIP_SCORE_UPDATE.get()
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("scores need torchmetrics: pip install 'cersa-diffusion[score]'") from error

# The usual weight for generated pictures, and the weight of Hessel et al.
PERCENT, HESSEL = 100.0, 2.5


def clipscore_torchmetrics(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    clip: TransformersClip,
    *,
    weight: float = PERCENT,
    batch_size: int = 32,
) -> list[float]:
    """CLIPScore of each picture with its prompt, by torchmetrics.

    Args:
        pictures: RGB pictures of any size.
        prompts: one per picture; those longer than the context of the CLIP are truncated, with a warning.
        clip: the model.
        weight: factor of the cosine: 100, or 2.5 as in Hessel et al.
        batch_size: number of pictures per forward pass.

    Returns:
        One score per picture, from 0 to `weight`.

    Raises:
        ConfigError: the numbers of pictures and prompts differ, or there are none.
    """
    _check(pictures, prompts)
    clip.warn_of_truncation(prompts)
    model, processor = clip.for_torchmetrics()
    scores = []
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc="CLIPScore (torchmetrics)", unit="batch", leave=False, disable=len(starts) == 1):
        # torchmetrics computes on the device of the pictures.
        pixels = [pil_to_tensor(picture).to(clip.device) for picture in pictures[start : start + batch_size]]
        with torch.inference_mode():
            percent, _ = clip_score_update(pixels, list(prompts[start : start + batch_size]), model, processor)
        scores += (weight * (percent.float().cpu() / 100).clamp_min(0)).tolist()
    return scores


def clipscore_open_clip(
    pictures: Sequence[Image.Image], prompts: Sequence[str], clip: OpenClipModel, *, weight: float = PERCENT, batch_size: int = 32
) -> list[float]:
    """As `clipscore_torchmetrics`, but from the embeddings of an open_clip model."""
    _check(pictures, prompts)
    clip.warn_of_truncation(prompts)
    different = list(dict.fromkeys(prompts))
    texts = clip.embed_texts(different, batch_size)[[different.index(prompt) for prompt in prompts]]
    cosines = (clip.embed_pictures(pictures, batch_size) * texts).sum(-1)
    return (weight * cosines.clamp_min(0)).tolist()


# Backend -> (class that loads a model by name and device, function that scores with this model).
BACKENDS = {"torchmetrics": (TransformersClip, clipscore_torchmetrics), "open_clip": (OpenClipModel, clipscore_open_clip)}


def _check(pictures: Sequence, prompts: Sequence) -> None:
    if len(pictures) != len(prompts) or not pictures:
        raise ConfigError(f"{len(pictures)} pictures and {len(prompts)} prompts: expected one prompt per picture, at least one")
