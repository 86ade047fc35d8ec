"""How well CLIP tells pictures apart."""

import torch
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .captions import background, encode, look, with_article
from .pictures import Compositor
from .render import Pictures, load_pictures
from .settings import CAT_FACES, COLOURS, STYLES, Folders

# The ways to say the same thing over which a name's score is averaged (prompt ensembling, Radford et al. 2021, section 3.1.4).
CAPTION_FORMS = (
    "a {look} of {name}{background}",
    "{name}, {look}{background}",
    "an emoji of {name}{background}",
    "{name}{background}",
)


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as CLIP takes them.

    Args:
        pictures: Pictures between -1 and 1.
    """
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1)
    deviation = torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    return ((pictures + 1) / 2 - mean) / deviation


@torch.no_grad()
def similarities(clip: CLIPModel, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cosine of every picture with every caption, `[pictures, captions]`.

    Args:
        clip: The model.
        pictures: Normalised pictures.
        ids: Token ids of the captions.
    """
    texts = [clip(input_ids=chunk, pixel_values=pictures[:1]).text_embeds for chunk in ids.split(200)]
    images = [clip(input_ids=ids[:1], pixel_values=chunk).image_embeds for chunk in pictures.split(100)]
    return torch.cat(images) @ torch.cat(texts).T


def accuracies(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, prefix: str) -> dict[str, float]:
    """How often the right caption wins over captions that differ in one word, on undisturbed pictures.

    Args:
        clip: The model.
        tokenizer: Its tokenizer.
        pictures: The pictures; each is put on one background.
        prefix: Put before the names of the figures.
    """
    number = torch.arange(len(pictures.names))
    names = sorted(set(pictures.names))
    name = torch.tensor([names.index(word) for word in pictures.names])
    style = torch.tensor([STYLES.index(word) for word in pictures.styles])
    colour = number % len(COLOURS)
    captions = [
        CAPTION_FORMS[0].format(look=look(style_word), name=with_article(name_word), background=background(colour_word))
        for name_word in names
        for style_word in STYLES
        for colour_word in COLOURS
    ]
    images = normalised(Compositor(pictures)(number, colour))
    scores = similarities(clip, images, encode(tokenizer, captions)).view(-1, len(names), len(STYLES), len(COLOURS))
    by_name = scores[number, :, style, colour]
    by_style = scores[number, name, :, colour]
    by_colour = scores[number, name, style]
    right = by_name[number, name, None]
    return {
        f"{prefix}_top1_name": (by_name.argmax(1) == name).float().mean().item(),
        f"{prefix}_top5_name": ((by_name > right).sum(1) < 5).float().mean().item(),
        f"{prefix}_wrong_names_beaten": ((by_name < right).sum(1) / (len(names) - 1)).mean().item(),
        f"{prefix}_top1_style": (by_style.argmax(1) == style).float().mean().item(),
        f"{prefix}_top1_background": (by_colour.argmax(1) == colour).float().mean().item(),
    }


def averaged_accuracies(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, prefix: str) -> dict[str, float]:
    """How often the right name wins when the cosines of all caption forms are averaged.

    Args:
        clip: The model.
        tokenizer: Its tokenizer.
        pictures: The pictures; each is put on one background.
        prefix: Put before the names of the figures.
    """
    names, colours = sorted(set(pictures.names)), list(COLOURS)
    number = torch.arange(len(pictures.names))
    images = normalised(Compositor(pictures)(number, number % len(colours)))
    rows = []
    for i, style in enumerate(pictures.styles):
        fields = {"look": look(style), "background": background(colours[i % len(colours)])}
        captions = [form.format(name=with_article(name), **fields) for form in CAPTION_FORMS for name in names]
        rows.append(similarities(clip, images[i : i + 1], encode(tokenizer, captions))[0].view(len(CAPTION_FORMS), -1).mean(0))
    scores, name = torch.stack(rows), torch.tensor([names.index(word) for word in pictures.names])
    right = scores[number, name, None]
    return {
        f"{prefix}_averaged_top1_name": (scores.argmax(1) == name).float().mean().item(),
        f"{prefix}_averaged_top5_name": ((scores > right).sum(1) < 5).float().mean().item(),
    }


def held_back_cats(folders: Folders) -> Pictures:
    """The cat faces that no model has seen, in the 3D look.

    Args:
        folders: Where the build works.
    """
    pictures = load_pictures(folders)
    pairs = enumerate(zip(pictures.names, pictures.styles, strict=True))
    return pictures.subset([i for i, (name, style) in pairs if name in CAT_FACES and style == "3d"])
