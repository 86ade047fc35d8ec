"""Latents of pictures and embeddings of prompts, computed once before training and optionally kept on disk for later runs.

On disk, the name of an entry is a hash of the input tensors (pixels, token ids) and of the weights of the models, so that it
always belongs to this picture, crop and model. The device is not part of the hash: a CPU also uses the entries of a GPU, which
differ from its own by rounding.
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

# Increased whenever the same inputs may give different entries.
VERSION = "3"
LatentCache = dict[View, tuple[Tensor, Tensor]]


@torch.no_grad()
def cache_latents(
    instance: list[Example], classes: list[Example], config: DreamBoothConfig, vae: nn.Module, show_progress: bool = True
) -> LatentCache:
    """Mean and standard deviation of the VAE's posterior for every view of a run.

    The crop of each picture is drawn once; the noise of the posterior is still drawn for every sample. Views are encoded one at
    a time. On a CPU, a run with `center_crop` and one picture per batch is therefore bit for bit the same as without a cache;
    with larger batches it differs by rounding, which depends on the pictures that are encoded together.

    Args:
        instance: the pictures of the subject.
        classes: the class pictures; empty without prior preservation.
        config: sizes, crops and flips, and whether to keep entries on disk (`cache_to_disk`).
        vae: the VAE, on the device and in the dtype for encoding.
        show_progress: whether to show a progress bar.

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
        posterior = store.get([pixels], lambda pixels=pixels: _posterior(pixels, config.family, vae), view.example.name)
        entries[view] = posterior["mean"], posterior["std"]
    store.trim()
    return entries


def _posterior(pixels: Tensor, family: Family, vae: nn.Module) -> dict[str, Tensor]:
    mean, std = family.posterior(vae, pixels[None].to(vae.device, vae.dtype))
    return {"mean": mean[0], "std": std[0]}


@torch.no_grad()
def cache_text_embeddings(
    prompts: Iterable[str], config: DreamBoothConfig, base: DiffusionPipeline, show_progress: bool = True
) -> dict[str, dict[str, Tensor]]:
    """The output of the text encoders for every prompt of a run, encoded one at a time.

    Args:
        prompts: the prompts of the examples, in any order, with or without repetitions.
        config: the family of pipelines, and whether to keep entries on disk (`cache_to_disk`).
        base: the pipeline of the tokenizers and text encoders, which keep their device and dtype.
        show_progress: whether to show a progress bar.

    Returns:
        For `DreamBoothLoss`: prompt -> the output of the family's `encode` for it, in CPU memory.

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
    """All values of a tokenizer that affect an embedding: the ids of the prompt, the id of the padding, and the padded length."""
    return torch.tensor([*tokenizer(prompt, truncation=True).input_ids, tokenizer.pad_token_id, tokenizer.model_max_length])


class _Store:
    """Computes entries, or reads those that an earlier run or another process has written.

    Args:
        folder: sub-folder of the cache.
        on_disk: whether to keep entries there.
        models: the models that compute the entries.
    """

    def __init__(self, folder: str, on_disk: bool, models: list[nn.Module]):
        self.disk = TensorCache.default(folder) if on_disk else None
        if on_disk and self.disk is None:
            warnings.warn("cache_to_disk has no effect: CERSA_CACHE is off", stacklevel=3)
        self.models = _tensor_digest(_sorted_weights(models)) if self.disk is not None else ""

    def get(self, inputs: list[Tensor], compute: Callable[[], dict[str, Tensor]], name: str) -> dict[str, Tensor]:
        """The entry for inputs of the models; `compute` computes a missing one, and messages call it `name`."""
        if self.disk is None:
            return _finite_on_cpu(compute(), name)
        key = _tensor_digest(inputs, VERSION, self.models)
        entry = self._read(key)
        if entry is not None:
            return entry
        with self.disk.claim(key):
            entry = self._read(key)  # another process may have written it in the meantime
            if entry is None:
                entry = _finite_on_cpu(compute(), name)
                self.disk.write_tensors(key, entry)
        return entry

    def _read(self, key: str) -> dict[str, Tensor] | None:
        entry = self.disk.read_tensors(key)
        # Copied into memory, because the cache may remove the file.
        return None if entry is None else {name: tensor.clone() for name, tensor in entry.items()}

    def trim(self) -> None:
        """Removes entries on disk beyond the limit of the cache."""
        if self.disk is not None:
            self.disk.trim()


def _finite_on_cpu(entry: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    for tensor in entry.values():
        if not torch.isfinite(tensor).all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise NonFiniteError(f"{name} encodes to NaN or infinity in {dtype}: use mixed_precision bf16 or no, or remove it")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in entry.items()}


def _sorted_weights(models: list[nn.Module]) -> Iterator[Tensor]:
    for model in models:
        yield from (tensor for _, tensor in sorted(model.state_dict().items()))


def _tensor_digest(tensors: Iterable[Tensor], *words: str) -> str:
    """A hash of tensors (bytes, dtypes, shapes) and of words."""
    digest = hashlib.sha256(" ".join(words).encode())
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f" {data.dtype} {tuple(data.shape)} ".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
