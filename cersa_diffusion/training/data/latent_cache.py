"""What the frozen models give for pictures and prompts, computed once before training; for later runs as well on disk.

On disk an entry is named by a hash of the very tensors that go in (pixels, token ids) and of the weights they go through, so
that it is never another picture's, crop's or model's. The device is not part of it: entries of a GPU serve on a CPU and differ
from its own by rounding.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from cersa_diffusion.errors import NonFiniteError
from cersa_diffusion.families.base import Family
from cersa_diffusion.training.data.captions import Example
from cersa_diffusion.training.data.dataset import View, fixed_views
from cersa_diffusion.training.settings.config import DreamBoothConfig
from cersa_diffusion.weights.cache import LATENTS, TEXT_EMBEDDINGS, TensorCache

# Raised whenever the same inputs may give other entries.
VERSION = "3"
LatentCache = dict[View, tuple[Tensor, Tensor]]


@torch.no_grad()
def cache_latents(
    instance: list[Example], classes: list[Example], config: DreamBoothConfig, vae: nn.Module, show_progress: bool = True
) -> LatentCache:
    """Mean and standard deviation of the VAE's posterior for every view of the pictures that a run can show.

    A random crop is drawn once for each picture; noise of the posterior is still drawn for every sample. Views are encoded one at
    a time: with `center_crop` a run on one picture a batch is bit for bit the one without a cache (on a CPU), and with more only
    close to it, by the rounding that depends on what is encoded together.

    Args:
        instance: pictures of the subject.
        classes: class pictures, empty without prior preservation.
        config: sizes, crops and flips, and whether to keep entries on disk (`cache_to_disk`).
        vae: on the device and in the dtype in which it encodes.
        show_progress: whether there is a progress bar.

    Returns:
        For `DreamBoothDataset`: view -> mean and standard deviation, (c, h', w') each, in the VAE's dtype and CPU memory.

    Raises:
        NonFiniteError: a picture has NaN or infinite latents.
    """
    views = fixed_views(instance, classes, config)
    store = _Store(LATENTS, config.cache_to_disk, [vae])
    entries = {}
    for view in tqdm(views, desc="encoding pictures", unit="picture", disable=not show_progress):
        pixels = view.pixels()
        found = store.get([pixels], lambda pixels=pixels: _posterior(pixels, config.family, vae), view.example.name)
        entries[view] = found["mean"], found["std"]
    store.trim()
    return entries


def _posterior(pixels: Tensor, family: Family, vae: nn.Module) -> dict[str, Tensor]:
    mean, std = family.posterior(vae, pixels[None].to(vae.device, vae.dtype))
    return {"mean": mean[0], "std": std[0]}


@torch.no_grad()
def cache_text_embeddings(
    prompts: Iterable[str], config: DreamBoothConfig, base: DiffusionPipeline, show_progress: bool = True
) -> dict[str, dict[str, Tensor]]:
    """What the text encoders give for every prompt of a run, encoded one at a time.

    Args:
        prompts: those of the examples, in any order and as often as they come.
        config: says the family of pipelines, and whether to keep entries on disk (`cache_to_disk`).
        base: its tokenizers and text encoders are used, on their device and in their dtype.
        show_progress: whether there is a progress bar.

    Returns:
        For `DreamBoothLoss`: prompt -> what the family's `encode` gives for it, in CPU memory.

    Raises:
        NonFiniteError: a prompt has NaN or infinite embeddings.
    """
    family = config.family
    store = _Store(TEXT_EMBEDDINGS, config.cache_to_disk, [getattr(base, name) for name in family.text_encoders])
    tokenizers = [getattr(base, name.replace("text_encoder", "tokenizer")) for name in family.text_encoders]
    entries = {}
    unique = list(dict.fromkeys(prompts))
    for prompt in tqdm(unique, desc="encoding prompts", unit="prompt", disable=not show_progress):
        inputs = [_token_ids(tokenizer, prompt) for tokenizer in tokenizers]
        entries[prompt] = store.get(inputs, lambda prompt=prompt: family.encode(base, [prompt], {})[0], repr(prompt))
    store.trim()
    return entries


def _token_ids(tokenizer, prompt: str) -> Tensor:
    """All that a tokenizer adds to an embedding: the ids of a prompt, how it is padded, and how far."""
    return torch.tensor([*tokenizer(prompt, truncation=True).input_ids, tokenizer.pad_token_id, tokenizer.model_max_length])


class _Store:
    """Computes entries, or reads them where an earlier run or another process has written them.

    Args:
        part: sub-folder of the cache.
        on_disk: whether to keep entries there.
        models: what they go through.
    """

    def __init__(self, part: str, on_disk: bool, models: list[nn.Module]):
        self.disk = TensorCache.default(part) if on_disk else None
        if on_disk and self.disk is None:
            warnings.warn("cache_to_disk does nothing: CERSA_CACHE is off", stacklevel=3)
        self.models = _digest(_weights(models)) if self.disk is not None else ""

    def get(self, inputs: list[Tensor], compute: Callable[[], dict[str, Tensor]], name: str) -> dict[str, Tensor]:
        """An entry.

        Args:
            inputs: what it depends on beside the models.
            compute: makes it.
            name: how messages call it.
        """
        if self.disk is None:
            return _finite(compute(), name)
        key = _digest(inputs, VERSION, self.models)
        found = self._read(key)
        if found is not None:
            return found
        with self.disk.claim(key):
            found = self._read(key)  # another process may have been at it
            if found is None:
                found = _finite(compute(), name)
                self.disk.write_tensors(key, found)
        return found

    def _read(self, key: str) -> dict[str, Tensor] | None:
        found = self.disk.read_tensors(key)
        # Copied out of the file, which may be trimmed.
        return None if found is None else {name: tensor.clone() for name, tensor in found.items()}

    def trim(self) -> None:
        """Keeps the entries on disk within their limit."""
        if self.disk is not None:
            self.disk.trim()


def _finite(entry: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    for tensor in entry.values():
        if not torch.isfinite(tensor).all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise NonFiniteError(f"{name} encodes to NaN or infinity in {dtype}: use mixed_precision bf16 or no, or leave it out")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in entry.items()}


def _weights(models: list[nn.Module]) -> Iterator[Tensor]:
    for model in models:
        yield from (tensor for _, tensor in sorted(model.state_dict().items()))


def _digest(tensors: Iterable[Tensor], *facts: str) -> str:
    """A hash of tensors (bytes, dtypes, shapes) and of words."""
    digest = hashlib.sha256(" ".join(facts).encode())
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f" {data.dtype} {tuple(data.shape)} ".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
