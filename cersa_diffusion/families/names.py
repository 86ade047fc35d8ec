"""Names of the components of pipelines, in diffusers and in other programs."""

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# The linear layers of the attention in CLIP and T5, which the paper trains.
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
# Prefixes of kohya's keys; in a pipeline with two text encoders the first one is te1.
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def is_text_encoder(component: str) -> bool:
    """Whether a component of a pipeline is a text encoder."""
    return component.startswith("text_encoder")


def default_targets(component: str) -> str | list[str]:
    """The layers of a component that are trained by default: all linear layers of a denoiser, the attention of a text encoder."""
    return list(ATTENTION) if is_text_encoder(component) else "all-linear"
