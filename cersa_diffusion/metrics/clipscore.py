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
    # The public functions of torchmetrics return the mean of a batch, clamped as a mean; CLIPScore is clamped picture by picture.
    clip_score_update = CLIP_SCORE_UPDATE.get()
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("scores need torchmetrics: pip install 'cersa-diffusion[score]'") from error

# What is usual for pictures today, and what Hessel et al. multiply with.
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
        pictures: RGB pictures, of any sizes.
        prompts: one per picture; longer ones than the CLIP's context are cut, with a warning.
        clip: the model.
        weight: factor of the cosine: 100, or the 2.5 of Hessel et al.
        batch_size: pictures at once.

    Returns:
        One score per picture, 0 to `weight`.

    Raises:
        ConfigError: not as many prompts as pictures, or none.
    """
    _check(pictures, prompts)
    clip.warn_of_truncation(prompts)
    model, processor = clip.for_torchmetrics()
    scores = []
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc="CLIPScore (torchmetrics)", unit="batch", leave=False, disable=len(starts) == 1):
        # torchmetrics computes where the pictures are.
        pixels = [pil_to_tensor(picture).to(clip.device) for picture in pictures[start : start + batch_size]]
        with torch.inference_mode():
            percent, _ = clip_score_update(pixels, list(prompts[start : start + batch_size]), model, processor)
        scores += (weight * (percent.float().cpu() / 100).clamp_min(0)).tolist()
    return scores


def clipscore_open_clip(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    clip: OpenClipModel,
    *,
    weight: float = PERCENT,
    batch_size: int = 32,
) -> list[float]:
    """CLIPScore of each picture with its prompt, from the embeddings of an open_clip model.

    Args, Returns, Raises: as `clipscore_torchmetrics`.
    """
    _check(pictures, prompts)
    clip.warn_of_truncation(prompts)
    different = list(dict.fromkeys(prompts))
    texts = clip.embed_texts(different, batch_size)[[different.index(prompt) for prompt in prompts]]
    cosines = (clip.embed_pictures(pictures, batch_size) * texts).sum(-1)
    return (weight * cosines.clamp_min(0)).tolist()


# Backend -> (loads a model by name and device, scores with it).
BACKENDS = {
    "torchmetrics": (TransformersClip, clipscore_torchmetrics),
    "open_clip": (OpenClipModel, clipscore_open_clip),
}


def _check(pictures: Sequence, prompts: Sequence) -> None:
    if len(pictures) != len(prompts) or not pictures:
        raise ConfigError(f"{len(pictures)} pictures and {len(prompts)} prompts: expected one prompt per picture, at least one")
