"""The embedded scoring models, and the bundled subjects' pictures with their class prompts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cersa_diffusion.metrics.clip_models import OpenClipModel, TransformersClip
from cersa_diffusion.metrics.encoders import VisionEncoder
from cersa_diffusion.pictures import load_picture


@pytest.fixture(scope="session")
def clip(clip_path) -> TransformersClip:
    return TransformersClip(clip_path)


@pytest.fixture(scope="session")
def open_clip_model(clip_path) -> OpenClipModel:
    return OpenClipModel(clip_path)


@pytest.fixture(scope="session")
def vit(vit_path) -> VisionEncoder:
    return VisionEncoder(vit_path)


@pytest.fixture(scope="session")
def vit_path(clip_path) -> Path:
    return clip_path.parent / "emoji-vit"


@pytest.fixture(scope="session")
def labelled(subject_path) -> list[tuple[str, Image.Image]]:
    """(class prompt with the background, picture) of every bundled subject in the style that the CLIP knows."""
    found = []
    for folder in sorted(subject_path.parent.glob("fluent-*")):
        subject = json.loads((folder / "subject.json").read_text())
        for entry in subject["instance"] + subject["held_back"]:
            prompt = f"{subject['class_prompt']} on a {entry['background']} background"
            found.append((prompt, load_picture(folder / entry["file"])))
    return found


@pytest.fixture(scope="session")
def prompts(labelled) -> list[str]:
    return [prompt for prompt, _ in labelled]


@pytest.fixture(scope="session")
def pictures(labelled) -> list[Image.Image]:
    return [picture for _, picture in labelled]
