"""CLIP models for scores: from transformers (adapted to torchmetrics) and from open_clip, with the same or its own weights."""

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from textwrap import shorten

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from transformers import BatchEncoding, CLIPModel, CLIPProcessor

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.metrics.embedding import embed_in_batches, scoring_device
from cersa_diffusion.text import one_line

try:
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("scores need open_clip_torch: pip install 'cersa-diffusion[score]'") from error


class ClipModel(ABC):
    """A CLIP with its preprocessing and its tokenizer.

    Attributes:
        name: the name or path that it was loaded from.
        label: name of its picture features in tables.
        device: where it computes.
        context_length: largest number of tokens of a text, including the two special tokens.
        preprocess: picture -> normalised pixels (3, size, size).
    """

    label = "CLIP"
    name: str
    device: torch.device
    context_length: int
    preprocess: Callable[[Image.Image], Tensor]

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """The number of tokens of a text before truncation, including the two special tokens."""

    @abstractmethod
    def _picture_features(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _text_features(self, texts: list[str]) -> Tensor: ...

    def embed_pictures(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit vectors of pictures: (pictures, width), float32, on the CPU."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            return self._picture_features(torch.stack([self.preprocess(picture) for picture in batch]).to(self.device))

        return embed_in_batches(pictures, embed, batch_size, "CLIP, pictures")

    def embed_texts(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Unit vectors of texts: (texts, width), float32, on the CPU. Texts longer than the context are truncated."""
        return embed_in_batches(texts, lambda batch: self._text_features(list(batch)), batch_size, "CLIP, prompts")

    def warn_of_truncation(self, texts: Sequence[str]) -> int:
        """Warns if texts are longer than the context and will be truncated for the score.

        Returns:
            The number of different texts that are too long.
        """
        too_long = [text for text in dict.fromkeys(texts) if self.count_tokens(text) > self.context_length]
        if too_long:
            warnings.warn(
                f"CLIP {self.name}: {len(too_long)} of {len(set(texts))} prompts are longer than its context of "
                f"{self.context_length} tokens and are scored without their end, the first: {shorten(too_long[0], 80)!r}",
                # This line and not the line of the caller: Python then shows the same warning only once for all callers.
                stacklevel=1,
            )
        return len(too_long)


class TransformersClip(ClipModel):
    """A CLIP in transformers' format.

    Args:
        name_or_path: a folder or a model id on the hub.
        device: where to compute; by default the GPU if there is one.

    Raises:
        ConfigError: there is no such folder or model.
    """

    def __init__(self, name_or_path: str | os.PathLike, device: str | torch.device | None = None):
        self.name, self.device = os.fspath(name_or_path), scoring_device(device)
        try:
            self.model = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32).eval().to(self.device)
            processor = CLIPProcessor.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"CLIP {self.name}: cannot be loaded ({one_line(error)})") from error
        self.tokenizer = processor.tokenizer
        self.context_length = self.model.config.text_config.max_position_embeddings
        self.preprocess = _image_transform(processor.image_processor, self.model.config.vision_config.image_size)

    def tokenize(self, texts: list[str]) -> BatchEncoding:
        """Token ids and mask (texts, context). A truncated text keeps its end-of-text token, from which CLIP takes its vector."""
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt")

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False).input_ids)

    def _picture_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.get_text_features(**self.tokenize(texts).to(self.device)).pooler_output

    def for_torchmetrics(self) -> tuple["TorchmetricsModel", "TorchmetricsProcessor"]:
        """Model and processor as torchmetrics expects them."""
        return TorchmetricsModel(self.model), TorchmetricsProcessor(self)


class TorchmetricsModel(nn.Module):
    """A transformers CLIP whose `get_*_features` return tensors, as torchmetrics expects (transformers 5 returns objects)."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


class TorchmetricsProcessor:
    """The preprocessing of a CLIP in the form of a transformers processor.

    It exists for two reasons. torchmetrics truncates long texts after the tokenizer, which removes the end-of-text token, and
    then scores the vector of another token; here the tokenizer truncates. transformers resizes tensors, while the original CLIP
    resizes PIL pictures, and its crop differs by one pixel, which changes a score; here all backends resize and crop alike.
    """

    def __init__(self, clip: TransformersClip):
        self.clip = clip

    def __call__(self, text: list[str] | None = None, images: list[Tensor] | None = None, **_) -> dict | BatchEncoding:
        if text is not None:
            return self.clip.tokenize(text)
        return {"pixel_values": torch.stack([self.clip.preprocess(to_pil_image(image)) for image in images])}


class OpenClipModel(ClipModel):
    """A CLIP as an open_clip model.

    Args:
        name_or_path: a folder or hub id of a CLIP in transformers' format; or, as open_clip names models, "hf-hub:OWNER/NAME",
            "local-dir:FOLDER", or "ARCHITECTURE:PRETRAINED", where PRETRAINED is a tag ("ViT-B-16:openai") or a checkpoint file.
        device: where to compute; by default the GPU if there is one.

    Raises:
        ConfigError: the name has none of these forms, or the model cannot be loaded.
    """

    def __init__(self, name_or_path: str | os.PathLike, device: str | torch.device | None = None):
        self.name, self.device = os.fspath(name_or_path), scoring_device(device)
        if os.path.isdir(self.name) or (":" not in self.name and self.name.count("/") == 1):
            self._convert(TransformersClip(self.name, device="cpu"))
        elif ":" in self.name:
            self._load()
        else:
            raise ConfigError(
                f"CLIP {self.name}: there is no such folder, and the name has none of the forms OWNER/NAME, "
                "ARCHITECTURE:PRETRAINED (ViT-B-16:openai), hf-hub:OWNER/NAME, local-dir:FOLDER"
            )
        self.model.eval().to(self.device)

    def _convert(self, source: TransformersClip) -> None:
        self.model, self.preprocess = to_open_clip(source.model), source.preprocess
        self.context_length, self._count_tokens = source.context_length, source.count_tokens
        self.tokenize = lambda texts: source.tokenize(texts).input_ids

    def _load(self) -> None:
        architecture, pretrained = self.name, None
        if not self.name.startswith(("hf-hub:", "local-dir:")):
            architecture, _, pretrained = self.name.partition(":")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, pretrained=pretrained)
            self.tokenize = open_clip.get_tokenizer(architecture)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"CLIP {self.name}: open_clip cannot load it ({one_line(error)})") from error
        self.context_length = self.tokenize.context_length
        self._count_tokens = partial(_count_with_open_clip, self.tokenize)

    def count_tokens(self, text: str) -> int:
        return self._count_tokens(text)

    def _picture_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenize(texts).to(self.device))


def _count_with_open_clip(tokenize, text: str) -> int:
    # open_clip either wraps a tokenizer of transformers or has its own, which does not add the two special tokens.
    wrapped = getattr(tokenize, "tokenizer", None)
    return len(wrapped(text).input_ids) if wrapped else len(tokenize.encode(text)) + 2


def _image_transform(processor, image_size: int) -> Callable[[Image.Image], Tensor]:
    """A transformers image processor as an open_clip transform: resizes and crops PIL pictures as in the training of CLIP."""
    resize_mode = "shortest" if getattr(processor.size, "shortest_edge", None) else "squash"
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return open_clip.transform.image_transform(image_size, is_train=False, mean=mean, std=std, resize_mode=resize_mode)


def to_open_clip(source: CLIPModel) -> CLIP:
    """The same CLIP as an open_clip model: only the names and the layout of the attention weights differ.

    Raises:
        ConfigError: the CLIP has an activation that open_clip's CLIP does not have.
    """
    vision, text = source.config.vision_config, source.config.text_config
    if {vision.hidden_act, text.hidden_act} - {"gelu", "quick_gelu"} or vision.hidden_act != text.hidden_act:
        raise ConfigError(f"CLIP with activations {vision.hidden_act} and {text.hidden_act} has no open_clip counterpart")
    vision_config = CLIPVisionCfg(
        **_transformer_sizes(vision),
        head_width=vision.hidden_size // vision.num_attention_heads,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
    )
    text_config = CLIPTextCfg(
        **_transformer_sizes(text),
        heads=text.num_attention_heads,
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        # The configurations of OpenAI's models say 2 whatever their end-of-text token is. transformers then takes the token with
        # the highest id, as in the training of these models.
        pool_type="argmax" if text.eos_token_id == 2 else "eos",
        eos_id=text.eos_token_id,
    )
    model = CLIP(source.config.projection_dim, vision_config, text_config, quick_gelu=vision.hidden_act == "quick_gelu")
    model.load_state_dict(_open_clip_state(source.state_dict()))
    return model


def _transformer_sizes(config) -> dict[str, float]:
    width = config.hidden_size
    return {"layers": config.num_hidden_layers, "width": width, "mlp_ratio": config.intermediate_size / width}


_RENAMED = (
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
)


def _open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in state.items():
        if name.endswith("position_ids") or re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue
        query = re.search(r"\.self_attn\.q_proj\.(weight|bias)$", name)
        if query:
            tensor = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace(f"q_proj.{query[1]}", f"in_proj_{query[1]}")
        if name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted
