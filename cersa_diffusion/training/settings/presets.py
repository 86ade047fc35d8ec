"""Presets for the memory of a GPU: starting values for the command line and for `DreamBoothConfig(**PRESETS[name], ...)`.

They save memory by the cheapest means first: cached latents, 16 bits, an 8-bit optimizer, gradient checkpointing, and last a text
encoder that is not trained. Chosen with `cersa plan` for the shapes of Stable Diffusion 1.x and 2.x at 512 pixels.
"""

_TIGHT = {
    "mixed_precision": "fp16",
    "train_batch_size": 1,
    "gradient_checkpointing": True,
    "optimizer": "adamw8bit",
    "cache_latents": True,
    "sample_batch_size": 1,
}

PRESETS: dict[str, dict] = {
    "8gb": _TIGHT | {"train_text_encoder": False, "pre_compute_text_embeddings": True},
    "12gb": _TIGHT,
    "24gb": {"mixed_precision": "bf16", "train_batch_size": 4, "cache_latents": True},
}
