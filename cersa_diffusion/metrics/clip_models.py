"""CLIP models for scoring: from transformers, as torchmetrics takes them, and from open_clip, the same weights or its own."""

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from textwrap import shorten

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from transformers import BatchEncoding, CLIPModel, CLIPProcessor

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.metrics.embedding import embed_in_batches, scoring_device

try:
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("scores need open_clip_torch: pip install 'cersa-diffusion[score]'") from error


class ClipModel(ABC):
    """A CLIP with its preprocessing and its tokenizer.

    Attributes:
        name: what it was loaded from.
        label: how tables call its picture features.
        device: where it computes.
        context_length: tokens that it takes of a text, the two special ones included.
        preprocess: a picture -> its pixels (3, size, size), normalised.
    """

    label = "CLIP"
    name: str
    device: torch.device
    context_length: int
    preprocess: Callable[[Image.Image], Tensor]

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of a text, the two special ones included, before anything is cut off."""

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
        """Unit vectors of texts: (texts, width), float32, on the CPU. Texts beyond the context are cut."""
        return embed_in_batches(texts, lambda batch: self._text_features(list(batch)), batch_size, "CLIP, prompts")

    def warn_of_truncation(self, texts: Sequence[str]) -> int:
        """Warns where texts are longer than the context, and so will be scored without their end.

        Returns:
            How many different texts are.
        """
        longer = [text for text in dict.fromkeys(texts) if self.count_tokens(text) > self.context_length]
        if longer:
            warnings.warn(
                f"CLIP {self.name}: {len(longer)} of {len(set(texts))} prompts are longer than its context of "
                f"{self.context_length} tokens and are scored without their end, the first: {shorten(longer[0], 80)!r}",
                # This line, not the caller's: Python shows the same warning once, whoever asks.
                stacklevel=1,
            )
        return len(longer)


class TransformersClip(ClipModel):
    """A CLIP in transformers' format.

    Args:
        name_or_path: a folder or a model id on the hub.
        device: where to compute; the GPU where there is one when left out.

    Raises:
        ConfigError: no such folder or model.
    """

    def __init__(self, name_or_path: str | os.PathLike, device: str | torch.device | None = None):
        self.name, self.device = os.fspath(name_or_path), scoring_device(device)
        try:
            self.model = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32).eval().to(self.device)
            processor = CLIPProcessor.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"CLIP {self.name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
        self.tokenizer = processor.tokenizer
        self.context_length = self.model.config.text_config.max_position_embeddings
        self.preprocess = _transform(processor.image_processor, self.model.config.vision_config.image_size)

    def tokenize(self, texts: list[str]) -> BatchEncoding:
        """Token ids and mask (texts, context). What is cut keeps its end-of-text token, where CLIP reads its vector."""
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt")

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False).input_ids)

    def _picture_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.get_text_features(**self.tokenize(texts).to(self.device)).pooler_output

    def for_torchmetrics(self) -> tuple["TorchmetricsModel", "TorchmetricsProcessor"]:
        """Model and processor as torchmetrics takes them."""
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
    """A CLIP's preprocessing in the form of a transformers processor.

    It exists for two reasons. torchmetrics cuts long texts behind the tokenizer, end-of-text token included, and then scores the
    vector of another token; here the tokenizer cuts. And transformers resizes tensors where CLIP resized PIL pictures, and
    crops a pixel elsewhere, which shows in a score; here every backend resizes and crops the same way.
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
        name_or_path: a folder or hub id with a CLIP in transformers' format; or in open_clip's words "ARCHITECTURE:PRETRAINED",
            where PRETRAINED is a tag ("ViT-B-16:openai") or a checkpoint file, "hf-hub:OWNER/NAME", or "local-dir:FOLDER".
        device: where to compute; the GPU where there is one when left out.

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
                f"CLIP {self.name}: no such folder, and none of the forms OWNER/NAME, ARCHITECTURE:PRETRAINED (ViT-B-16:openai), "
                "hf-hub:OWNER/NAME, local-dir:FOLDER"
            )
        self.model.eval().to(self.device)

    def _convert(self, source: TransformersClip) -> None:
        self.model, self.preprocess = to_open_clip(source.model), source.preprocess
        self.context_length, self._length = source.context_length, source.count_tokens
        self.tokenize = lambda texts: source.tokenize(texts).input_ids

    def _load(self) -> None:
        architecture, pretrained = self.name, None
        if not self.name.startswith(("hf-hub:", "local-dir:")):
            architecture, _, pretrained = self.name.partition(":")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, pretrained=pretrained)
            self.tokenize = open_clip.get_tokenizer(architecture)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"CLIP {self.name}: open_clip cannot load it ({' '.join(str(error).split())[:200]})") from error
        self.context_length = self.tokenize.context_length
        # open_clip has tokenizers of transformers, wrapped, and its own, which leaves the two special tokens out.
        wrapped = getattr(self.tokenize, "tokenizer", None)
        self._length = (
            (lambda text: len(wrapped(text).input_ids)) if wrapped else lambda text: len(self.tokenize.encode(text)) + 2
        )

    def count_tokens(self, text: str) -> int:
        return self._length(text)

    def _picture_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenize(texts).to(self.device))


def _transform(processor, image_size: int) -> Callable[[Image.Image], Tensor]:
    """What a transformers image processor does, done by open_clip: resized and cropped as PIL pictures, as CLIP was trained."""
    return open_clip.transform.image_transform(
        image_size,
        is_train=False,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        resize_mode="shortest" if getattr(processor.size, "shortest_edge", None) else "squash",
    )


def to_open_clip(source: CLIPModel) -> CLIP:
    """The same CLIP as an open_clip model: only names and the layout of attention differ.

    Raises:
        ConfigError: an activation that open_clip's CLIP does not have.
    """
    vision, text = source.config.vision_config, source.config.text_config
    if {vision.hidden_act, text.hidden_act} - {"gelu", "quick_gelu"} or vision.hidden_act != text.hidden_act:
        raise ConfigError(f"CLIP with activations {vision.hidden_act} and {text.hidden_act} has no open_clip counterpart")
    model = CLIP(
        embed_dim=source.config.projection_dim,
        vision_cfg=CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        text_cfg=CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
            mlp_ratio=text.intermediate_size / text.hidden_size,
            # 2 stands in the configurations of OpenAI's models, whatever their end-of-text token is; transformers then takes the
            # highest id, as these models were trained.
            pool_type="argmax" if text.eos_token_id == 2 else "eos",
            eos_id=text.eos_token_id,
        ),
        quick_gelu=vision.hidden_act == "quick_gelu",
    )
    model.load_state_dict(_open_clip_state(source.state_dict()))
    return model


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
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace(f"q_proj.{query[1]}", f"in_proj_{query[1]}")
        if name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted
