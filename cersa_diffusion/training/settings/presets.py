"""Settings that fit a card: what the command line and `DreamBoothConfig(**PRESETS[name], ...)` start from.

They trade speed for memory in the order that costs least: cached latents, 16 bits, an 8-bit optimizer, checkpointing, and last a
text encoder that is not trained. Chosen by `cersa plan` for the shapes of Stable Diffusion 1.x and 2.x at 512 pixels.
"""

_TIGHT = {
    "mixed_precision": "fp16",
    "train_batch_size": 1,
    "gradient_checkpointing": True,
    "optimizer": "adamw8bit",
    "cache_latents": True,
    "sample_batch_size": 1,
    "prior_generation_precision": "fp16",
}

PRESETS: dict[str, dict] = {
    "8gb": _TIGHT | {"train_text_encoder": False, "pre_compute_text_embeddings": True},
    "12gb": _TIGHT,
    "24gb": {
        "mixed_precision": "bf16",
        "train_batch_size": 4,
        "cache_latents": True,
        "prior_generation_precision": "bf16",
    },
}
