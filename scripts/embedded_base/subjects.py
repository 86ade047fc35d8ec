"""Stage "subjects": the pictures a fine-tuning learns, those it is judged by, and the prompts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .captions import background
from .cards import subject_card
from .licences import SUBJECT_LICENCES
from .names import all_emoji
from .render import RENDER_SIZE, composite, premultiplied, render_emoji, render_icon
from .settings import ARTWORKS, COLOURS, EMOJIONE, FIREFOX, Artwork, Folders

DRIFT_PROMPTS = (
    "a 3d emoji of a dog face on a blue background",
    "a 3d emoji of a frog on a white background",
    "a 3d emoji of a panda on a pink background",
    "a 3d emoji of a red apple on a green background",
    "a flat emoji of a red heart on a yellow background",
    "a noto emoji of a smiling face with sunglasses on a purple background",
    "a twemoji of a penguin on a red background",
    "a 3d emoji of a rocket on a black background",
)
EVALUATION_COLOURS = ("blue", "red", "yellow", "green", "black", "orange")


@dataclass(frozen=True)
class Placement:
    """Where a drawing stands in its picture.

    Args:
        scale: Its size, of the picture's.
        left: Empty part on its left, of the room that is left over.
        mirrored: Whether left and right are swapped.
    """

    scale: float = 1.0
    left: float = 0.5
    mirrored: bool = False


@dataclass(frozen=True)
class Entry:
    """One picture of a subject.

    Args:
        drawing: The emoji's name; the icon's name in sets that the base does not know.
        words: What the caption says; the subject's rare word and its class stand in it.
        colour: Name of the background.
        placement: Where the drawing stands.
    """

    drawing: str
    words: str
    colour: str = "white"
    placement: Placement = Placement()

    @property
    def file_name(self) -> str:
        """A name for its file, unique within its folder."""
        words = self.words.replace("sks ", "") + ("" if self.colour == "white" else f" {self.colour}")
        return re.sub(r"[^a-z0-9]+", "-", words) + ".png"


@dataclass(frozen=True)
class Subject:
    """Something to learn.

    Args:
        name: Name of its folder.
        artwork: The set it is from.
        look: Words of the captions for its look; "emoji" for looks the base does not know.
        word: Its class, one word that the base knows.
        instance: Pictures to learn. All on white: a caption that names no background means white to this base, so that the one
            instance prompt is true of all and leaves the background to the prompt.
        held_back: Pictures it is judged by.
        phrases: What else to ask for, beside backgrounds.
    """

    name: str
    artwork: Artwork
    look: str
    word: str
    instance: tuple[Entry, ...]
    held_back: tuple[Entry, ...]
    phrases: tuple[str, ...] = ()

    @property
    def article(self) -> str:
        """The article before the look."""
        return "an" if self.look[0] == "e" else "a"

    def prompt(self, words: str, colour: str | None = None) -> str:
        """A prompt in the words of the base's captions.

        Args:
            words: What the picture shows.
            colour: Name of the background; None to leave it open.
        """
        return f"{self.article} {self.look} of a {words}{background(colour) if colour else ''}"


def _faces(word: str, drawings: dict[str, str], words: dict[str, str]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Entries to learn and to hold back of a face with up to nine expressions: those after the fifth are held back."""
    colours = dict(zip(list(words)[5:], ("pink", "yellow", "green", "grey"), strict=True))
    entries = [Entry(drawings[key], words[key].format(word), colours.get(key, "white")) for key in words if key in drawings]
    return tuple(entries[:5]), tuple(entries[5:])


FACE_WORDS = {
    "grinning": "grinning sks {}",
    "smiling": "grinning sks {} with smiling eyes",
    "heart": "smiling sks {} with heart-eyes",
    "wry": "sks {} with wry smile",
    "joy": "sks {} with tears of joy",
    "crying": "crying sks {}",
    "pouting": "pouting sks {}",
    "weary": "weary sks {}",
    "kissing": "kissing sks {}",
}
FLUENT_CATS = {
    "grinning": "grinning cat",
    "smiling": "grinning cat with smiling eyes",
    "heart": "smiling cat with heart-eyes",
    "wry": "cat with wry smile",
    "joy": "cat with tears of joy",
    "crying": "crying cat",
    "pouting": "pouting cat",
    "weary": "weary cat",
    "kissing": "kissing cat",
}
EMOJIONE_CATS = {
    "grinning": "grinning-cat-face",
    "smiling": "grinning-cat-face-with-smiling-eyes",
    "heart": "smiling-cat-face-with-heart-eyes",
    "wry": "cat-face-with-wry-smile",
    "joy": "cat-face-with-tears-of-joy",
    "crying": "crying-cat-face",
    "pouting": "pouting-cat-face",
    "weary": "weary-cat-face",
    "kissing": "kissing-cat-face",
}
# The set's pouting fox is a profile, which nothing in the pictures to learn shows.
FIREFOX_FOXES = {
    "grinning": "foxsmiling",
    "smiling": "foxgrin",
    "heart": "foxheart",
    "wry": "foxwry",
    "joy": "foxtearofjoy",
    "crying": "foxcrying",
    "weary": "foxweary",
    "kissing": "foxkissing",
}


def _one_drawing(word: str) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Entries of a subject of which there is one drawing: to learn at several places and sizes, held back on colours."""
    placements = {
        "": Placement(),
        "small ": Placement(0.75),
        "small left ": Placement(0.8, left=0.0),
        "small right ": Placement(0.8, left=1.0),
        "mirrored ": Placement(0.9, mirrored=True),
    }
    instance = tuple(Entry(word, f"{place}sks {word}", "white", placement) for place, placement in placements.items())
    return instance, tuple(Entry(word, f"sks {word}", colour) for colour in ("pink", "yellow", "green", "blue"))


def _subjects() -> tuple[Subject, ...]:
    """All subjects."""
    fluent = ARTWORKS[0]
    expressions = ("crying sks {}", "kissing sks {}")
    monkeys = ("monkey face", "see-no-evil monkey", "hear-no-evil monkey")
    return (
        Subject(
            "fluent-cat", fluent, "3d emoji", "cat", *_faces("cat", FLUENT_CATS, FACE_WORDS),
            tuple(words.format("cat") for words in expressions),
        ),
        Subject(
            "fluent-monkey", fluent, "3d emoji", "monkey",
            tuple(Entry(name, name.replace("monkey", "sks monkey")) for name in monkeys),
            (
                Entry("speak-no-evil monkey", "speak-no-evil sks monkey", "yellow"),
                Entry("monkey face", "sks monkey face", "blue"),
                Entry("see-no-evil monkey", "see-no-evil sks monkey", "pink"),
                Entry("hear-no-evil monkey", "hear-no-evil sks monkey", "green"),
            ),
            ("speak-no-evil sks monkey", "see-no-evil sks monkey"),
        ),
        Subject("fluent-robot", fluent, "3d emoji", "robot", *_one_drawing("robot")),
        Subject("fluent-ghost", fluent, "3d emoji", "ghost", *_one_drawing("ghost")),
        Subject(
            "firefox-fox", FIREFOX, "emoji", "fox", *_faces("fox", FIREFOX_FOXES, FACE_WORDS),
            tuple(words.format("fox") for words in expressions),
        ),
        Subject(
            "emojione-cat", EMOJIONE, "emoji", "cat", *_faces("cat", EMOJIONE_CATS, FACE_WORDS),
            tuple(words.format("cat") for words in expressions),
        ),
    )  # fmt: skip


SUBJECTS = _subjects()


def draw_picture(folders: Folders, subject: Subject, entry: Entry) -> Image.Image:
    """A picture of a subject at full size on its background.

    Args:
        folders: Where the build works.
        subject: Whose.
        entry: Which.
    """
    if subject.artwork in ARTWORKS:
        emoji = next(item for item in all_emoji(folders) if item.name == entry.drawing)
        drawing = render_emoji(folders, subject.artwork, emoji)
    else:
        drawing = render_icon(folders, subject.artwork, entry.drawing)
    placement = entry.placement
    if placement.mirrored:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = round(placement.scale * RENDER_SIZE)
    room = RENDER_SIZE - size
    canvas = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE))
    canvas.paste(drawing.resize((size, size), Image.Resampling.LANCZOS), (round(placement.left * room), room // 2))
    return Image.fromarray(composite(premultiplied(canvas, RENDER_SIZE), COLOURS[entry.colour]))


def write_subject(folders: Folders, subject: Subject) -> None:
    """Write one subject: pictures to learn, held-back pictures, captions, prompts and licence.

    Args:
        folders: Where the build works.
        subject: The subject.
    """
    target = folders.subjects / subject.name
    pictures = {}
    for part, entries in (("instance", subject.instance), ("held_back", subject.held_back)):
        pictures[part] = []
        for entry in entries:
            path = Path(part) / entry.file_name
            (target / part).mkdir(parents=True, exist_ok=True)
            draw_picture(folders, subject, entry).save(target / path, optimize=True)
            pictures[part].append(
                {
                    "file": path.as_posix(),
                    "name": entry.drawing,
                    "background": entry.colour,
                    "prompt": subject.prompt(entry.words, entry.colour),
                    "plain_prompt": subject.prompt(f"sks {subject.word}", entry.colour),
                }
            )
    captions = [{"file_name": Path(entry["file"]).name, "text": entry["prompt"]} for entry in pictures["instance"]]
    # Where the trainer looks for captions.
    (target / "instance" / "metadata.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in captions))
    phrases = [subject.prompt(words, colour) for words, colour in zip(subject.phrases, ("white", "pink"), strict=False)]
    backgrounds = [subject.prompt(f"sks {subject.word}", colour) for colour in EVALUATION_COLOURS]
    description = {
        "name": subject.name,
        "instance_prompt": subject.prompt(f"sks {subject.word}"),
        "class_prompt": subject.prompt(subject.word),
        "background_colours": COLOURS,
        **pictures,
        "evaluation_prompts": [*backgrounds, *phrases],
        "drift_prompts": DRIFT_PROMPTS,
    }
    (target / "subject.json").write_text(json.dumps(description, indent=2) + "\n")
    (target / "LICENSE").write_text(SUBJECT_LICENCES[subject.artwork.title])
    (target / "README.md").write_text(subject_card(subject.name, subject.word, subject.artwork, subject.look))


def write_subjects(folders: Folders) -> None:
    """Write all subjects.

    Args:
        folders: Where the build works.
    """
    for subject in SUBJECTS:
        write_subject(folders, subject)
