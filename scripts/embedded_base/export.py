"""Stage "export": everything trained becomes folders that diffusers and transformers load."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from .cards import write_base_card, write_clip_card, write_vit_card
from .clip import export_clip
from .diffusion import training_pictures
from .evaluation import evaluate
from .licences import write_model_licences
from .pipeline import load_pipeline, write_pipeline, write_sample_sheet
from .settings import Folders
from .spectra import spectrum_table
from .subjects import write_subjects
from .vit import export_vit


def export(folders: Folders) -> None:
    """Write the pipeline, CLIP, the ViT and the subjects with their cards, and evaluate the pipeline.

    Args:
        folders: Where the build works.
    """
    names = sorted(set(training_pictures(folders).names))
    write_subjects(folders)
    export_clip(folders)
    write_model_licences(folders.clip)
    write_clip_card(folders, names)
    export_vit(folders)
    write_model_licences(folders.vit)
    write_vit_card(folders)

    diffusion = folders.stage("diffusion")
    write_pipeline(
        folders,
        folders.base,
        UNet2DConditionModel.from_pretrained(diffusion / "unet"),
        CLIPTextModel.from_pretrained(diffusion / "text_encoder", dtype=torch.float32),
        AutoencoderKL.from_pretrained(folders.stage("autoencoder") / "model"),
    )
    pipeline = load_pipeline(folders.base)
    spectra = spectrum_table({"denoiser": pipeline.unet, "text encoder": pipeline.text_encoder})
    write_sample_sheet(pipeline, folders.base / "samples.png")
    write_model_licences(folders.base)
    evaluate(folders, folders.base)
    write_base_card(folders, names, spectra)
