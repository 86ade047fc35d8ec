"""The names that the components of pipelines have, in diffusers and in other tools."""

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# The linear layers of the attention of CLIP and T5, as the paper trains them.
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
# What kohya's keys begin with; where there are two text encoders the first one is te1.
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def is_text_encoder(component: str) -> bool:
    """Whether a component of a pipeline is a text encoder."""
    return component.startswith("text_encoder")


def default_targets(component: str) -> str | list[str]:
    """Which layers of a component are trained, unless others are asked for.

    Args:
        component: name in the pipeline.

    Returns:
        As `match_targets` takes it: all linear layers of a denoiser, the attention of a text encoder.
    """
    return list(ATTENTION) if is_text_encoder(component) else "all-linear"
