"""CLIP models for scoring: in transformers' format for torchmetrics, and the same weights as an open_clip model."""

import os
import re

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from cersa_diffusion.errors import ConfigError


class TensorFeatures(nn.Module):
    """A transformers CLIP whose `get_*_features` return tensors, as torchmetrics expects (transformers 5 returns objects)."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def load_clip(name_or_path: str | os.PathLike) -> tuple[TensorFeatures, CLIPProcessor]:
    """A CLIP in transformers' format from a folder or the hub, in float32.

    Raises:
        ConfigError: no such folder or model.
    """
    try:
        model = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32)
        return TensorFeatures(model).eval(), CLIPProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"CLIP {name_or_path}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error


class OpenClipModel:
    """An open_clip model with its own preprocessing and tokenizer.

    Args:
        name_or_path: a local folder with a CLIP in transformers' format, or "ARCHITECTURE:PRETRAINED" of open_clip
            ("ViT-B-16:openai").

    Raises:
        ConfigError: the name has neither form, or the model cannot be loaded.
    """

    def __init__(self, name_or_path: str | os.PathLike):
        name = os.fspath(name_or_path)
        if os.path.isdir(name):
            self._from_transformers(name)
        elif ":" in name:
            architecture, _, pretrained = name.partition(":")
            try:
                self.model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, pretrained=pretrained)
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(f"CLIP {name}: open_clip cannot load it ({' '.join(str(error).split())[:200]})") from error
            self.tokenize = open_clip.get_tokenizer(architecture)
        else:
            raise ConfigError(f"CLIP {name}: no such folder, and not of the form ARCHITECTURE:PRETRAINED (ViT-B-16:openai)")
        self.model.eval()

    def _from_transformers(self, folder: str) -> None:
        source, processor = load_clip(folder)
        self.model = to_open_clip(source.model)
        pictures = processor.image_processor
        self.preprocess = open_clip.transform.image_transform(
            source.config.vision_config.image_size, is_train=False, mean=tuple(pictures.image_mean), std=tuple(pictures.image_std)
        )
        context_length = source.config.text_config.max_position_embeddings
        self.tokenize = open_clip.tokenizer.HFTokenizer(folder, context_length=context_length, clean="whitespace")

    @torch.inference_mode()
    def embed_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """Unit vectors of pictures: (pictures, width)."""
        return self.model.encode_image(torch.stack([self.preprocess(picture) for picture in pictures]), normalize=True)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts: (texts, width)."""
        return self.model.encode_text(self.tokenize(texts), normalize=True)


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
            pool_type="eos",
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
