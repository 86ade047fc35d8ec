"""What the captions say: the name, the look, and the background."""

import torch
from transformers import CLIPTokenizer

from .names import Emoji
from .render import Pictures
from .settings import COLOURS, CONTEXT_LENGTH

# Each caption is drawn with equal chance, so that a repeated template is a more frequent one.
TEMPLATES = (
    *("a {look} of {name}{background}",) * 9,
    *("{name}, {look}{background}",) * 3,
    *("a {look} of {name}, {keyword}{background}",) * 2,
    "an emoji of {name}{background}",
    "{name}{background}",
)


def with_article(name: str) -> str:
    """A name as a caption says it.

    Args:
        name: Name of an emoji.
    """
    head = name.split(" with ")[0].split(" of ")[0]
    if head.endswith("s") and not head.endswith(("ss", "us")):
        return name
    return f"{'an' if name.startswith(('a', 'e', 'i', 'o', 'um')) else 'a'} {name}"


def look(style: str) -> str:
    """The words for a style.

    Args:
        style: Name of the style.
    """
    return "twemoji" if style == "twemoji" else f"{style} emoji"


def background(colour: str) -> str:
    """The words for a background, with a leading space.

    Args:
        colour: Name of the colour.
    """
    return f" on {'an' if colour[0] == 'o' else 'a'} {colour} background"


def short_names(names: list[str]) -> dict[str, str]:
    """Shorter names that mean the same thing among these: "cat" for "cat face" where no other "cat" is learned.

    Args:
        names: All names that are learned.
    """
    known = set(names)
    result = {}
    for name in names:
        short = name.removesuffix(" face")
        if name.endswith(" face") and " " not in short and short not in known and not short.endswith("ing"):
            result[name] = short
    return result


def captions_of(name: str, style: str, colour: str, short: str | None, keywords: tuple[str, ...]) -> list[str]:
    """All captions of a picture on a background, one for each entry of `TEMPLATES`.

    A white background is left out of every second caption: a caption without one means white.

    Args:
        name: Name of the emoji.
        style: Look of the picture.
        colour: Name of the background.
        short: A shorter name, used in every second caption.
        keywords: Other words for the emoji.
    """
    result = []
    for number, template in enumerate(TEMPLATES):
        fields = {
            "look": look(style),
            "name": with_article(short if short and number % 2 else name),
            "background": "" if colour == "white" and number % 4 != 3 else background(colour),
            "keyword": keywords[number % len(keywords)] if keywords else name,
        }
        result.append(template.format(**fields))
    return result


class CaptionTable:
    """The token ids of every caption of every picture, made once so that training only looks them up.

    Args:
        pictures: The pictures.
        emoji: All emoji, for their keywords.
        tokenizer: The tokenizer.
    """

    def __init__(self, pictures: Pictures, emoji: list[Emoji], tokenizer: CLIPTokenizer) -> None:
        keywords = {item.name: item.keywords for item in emoji}
        shorter = short_names(sorted(set(pictures.names)))
        texts = []
        for name, style in zip(pictures.names, pictures.styles, strict=True):
            for colour in COLOURS:
                texts += captions_of(name, style, colour, shorter.get(name), keywords[name])
        ids = encode(tokenizer, texts).to(torch.int16)
        self.ids = ids.view(len(pictures.names), len(COLOURS), len(TEMPLATES), CONTEXT_LENGTH)
        self.empty = encode(tokenizer, [""])[0]

    def draw(
        self, picture: torch.Tensor, colour: torch.Tensor, empty_rate: float = 0.0, any_look_rate: float = 0.0
    ) -> torch.Tensor:
        """A random caption for each picture, `[count, length]`.

        Args:
            picture: Indices of the pictures.
            colour: Indices of the backgrounds.
            empty_rate: How often the caption is empty instead.
            any_look_rate: How often the caption is one of the templates that say no look, whatever was drawn before.
        """
        template = torch.randint(len(TEMPLATES), picture.shape)
        any_look = torch.tensor([i for i, text in enumerate(TEMPLATES) if "{look}" not in text])
        other = any_look[torch.randint(len(any_look), picture.shape)]
        template = torch.where(torch.rand(picture.shape) < any_look_rate, other, template)
        ids = self.ids[picture, colour, template].long()
        ids[torch.rand(picture.shape) < empty_rate] = self.empty
        return ids


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, padded and cut to the length the text encoders take.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
    """
    options = {"padding": "max_length", "max_length": CONTEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids
