"""What the embedded models are made of: artwork, colours, held-back pictures, sizes and folders."""

from dataclasses import dataclass
from pathlib import Path

PICTURE_SIZE = 64
CONTEXT_LENGTH = 24
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
VOCABULARY_SIZE = 3293


@dataclass(frozen=True)
class Artwork:
    """One set of pictures, and where it comes from.

    Args:
        style: The word that names the look in captions; empty where no caption names it.
        package: Registry package that carries the pictures.
        version: Version of that package.
        title: Name of the set, for people.
        source: Where the artists publish it.
        licence: Licence of the pictures.
    """

    style: str
    package: str
    version: str
    title: str
    source: str
    licence: str


ARTWORKS = (
    Artwork(
        "3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Fluent Emoji, 3D",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
    ),
    Artwork(
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "Fluent Emoji, flat",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
    ),
    Artwork(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "Noto Emoji",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
    ),
    Artwork(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "Twemoji",
        "https://github.com/jdecked/twemoji",
        "CC BY 4.0",
    ),
)
STYLES = tuple(artwork.style for artwork in ARTWORKS)

# Looks that no model here has seen: subjects of personalisation come from them.
FIREFOX = Artwork(
    "",
    "@iconify-json/fxemoji",
    "1.2.2",
    "Firefox OS Emoji",
    "https://github.com/mozilla/fxemoji",
    "Apache-2.0",
)
EMOJIONE = Artwork(
    "",
    "@iconify-json/emojione",
    "1.2.3",
    "Emoji One 2",
    "https://github.com/EmojiTwo/emojitwo",
    "CC BY 4.0",
)
NAMES_PACKAGE = ("unicode-emoji-json", "0.9.0")
KEYWORDS_PACKAGE = ("emojilib", "4.0.3")

# White comes first: it is the background of a caption that names none.
COLOURS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (150, 150, 150),
    "red": (226, 62, 56),
    "orange": (250, 150, 50),
    "yellow": (252, 222, 92),
    "green": (96, 184, 92),
    "blue": (74, 134, 226),
    "purple": (150, 92, 200),
    "pink": (250, 172, 204),
}

CAT_FACES = (
    "cat face",
    "grinning cat",
    "grinning cat with smiling eyes",
    "cat with tears of joy",
    "smiling cat with heart-eyes",
    "cat with wry smile",
    "kissing cat",
    "weary cat",
    "crying cat",
    "pouting cat",
)
MONKEYS = ("monkey face", "monkey", "see-no-evil monkey", "hear-no-evil monkey", "speak-no-evil monkey")

# These characters are the new subjects of personalisation: never shown in a Fluent look, neither to the base nor to CLIP.
HELD_BACK_NAMES = frozenset((*CAT_FACES, *MONKEYS, "robot", "ghost"))
HELD_BACK_STYLES = frozenset(("3d", "flat"))


@dataclass(frozen=True)
class Folders:
    """Where the build keeps its work files and its results.

    Args:
        work: Work files; may be deleted at any time, at the price of a new build.
        assets: The results.
        vocabulary: Which names are learned: "small", "medium" or "full".
    """

    work: Path
    assets: Path
    vocabulary: str

    @property
    def packages(self) -> Path:
        """The registry packages, as fetched."""
        return self.work / "packages"

    @property
    def pictures(self) -> Path:
        """All pictures as RGBA arrays."""
        return self.work / "pictures.npz"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that every text encoder here uses."""
        return self.work / "tokenizer"

    @property
    def base(self) -> Path:
        """The diffusers pipeline."""
        return self.assets / "emoji-base"

    @property
    def clip(self) -> Path:
        """The CLIP that scores pictures."""
        return self.assets / "emoji-clip"

    @property
    def vit(self) -> Path:
        """The vision transformer that names an emoji's group."""
        return self.assets / "emoji-vit"

    @property
    def subjects(self) -> Path:
        """The subjects to learn."""
        return self.assets / "subjects"

    def stage(self, name: str) -> Path:
        """Work folder of one training stage; the autoencoder and the ViT see all names, whatever the vocabulary.

        Args:
            name: Name of the stage.
        """
        folder = self.work / (name if name in ("autoencoder", "vit") else f"{name}-{self.vocabulary}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
