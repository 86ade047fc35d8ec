"""CLIPScore (Hessel et al. 2021): 100 * max(cos(picture, prompt), 0), through torchmetrics or through open_clip."""

import torch
from PIL import Image
from torchmetrics.multimodal import CLIPScore
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm
from transformers import CLIPProcessor

from cersa_diffusion.metrics.clip_models import OpenClipModel, TensorFeatures


def clipscore_torchmetrics(
    pictures: list[Image.Image], prompts: list[str], clip: tuple[TensorFeatures, CLIPProcessor]
) -> list[float]:
    """CLIPScore of each picture with its prompt, by `torchmetrics.multimodal.CLIPScore`.

    Args:
        pictures: RGB pictures.
        prompts: one per picture.
        clip: of `load_clip`.

    Returns:
        One score per picture, 0 to 100.
    """
    metric = CLIPScore(model_name_or_path=lambda: clip)
    scores = []
    # A pair at a time: torchmetrics clamps the mean of an update, CLIPScore is clamped per picture.
    for picture, prompt in tqdm(list(zip(pictures, prompts, strict=True)), desc="CLIPScore (torchmetrics)", leave=False):
        metric.reset()
        with torch.inference_mode():
            metric.update(pil_to_tensor(picture), prompt)
            scores.append(metric.compute().item())
    return scores


def clipscore_open_clip(
    pictures: list[Image.Image], prompts: list[str], clip: OpenClipModel, batch_size: int = 32
) -> list[float]:
    """CLIPScore of each picture with its prompt, from the embeddings of an open_clip model.

    Args:
        pictures: RGB pictures.
        prompts: one per picture.
        clip: the model.
        batch_size: pictures embedded at once.

    Returns:
        One score per picture, 0 to 100.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: expected one prompt per picture")
    scores = []
    for start in tqdm(range(0, len(pictures), batch_size), desc="CLIPScore (open_clip)", leave=False):
        batch = slice(start, start + batch_size)
        cosines = (clip.embed_pictures(pictures[batch]) * clip.embed_texts(prompts[batch])).sum(-1)
        scores += (100 * cosines.clamp_min(0)).tolist()
    return scores
