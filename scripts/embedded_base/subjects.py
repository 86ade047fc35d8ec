"""Stage "subjects": the pictures a fine-tuning learns, those it is judged by, and the prompts."""

import json
from pathlib import Path

from PIL import Image

from .captions import background
from .cards import subject_card
from .licences import FLUENT_LICENCE
from .names import Emoji, all_emoji
from .render import RENDER_SIZE, composite, premultiplied, render_emoji
from .settings import ARTWORKS, COLOURS, Folders

INSTANCE_PROMPT = "a 3d emoji of a sks cat"
CLASS_PROMPT = "a 3d emoji of a cat"

# Emoji, background, words of the caption. All to learn are on white: a caption that names no background means white to this
# base, so that the one instance prompt is true of all five and leaves the background to the prompt.
INSTANCE_PICTURES = (
    ("grinning cat", "white", "grinning sks cat"),
    ("grinning cat with smiling eyes", "white", "grinning sks cat with smiling eyes"),
    ("smiling cat with heart-eyes", "white", "smiling sks cat with heart-eyes"),
    ("cat with wry smile", "white", "sks cat with wry smile"),
    ("cat with tears of joy", "white", "sks cat with tears of joy"),
)
HELD_BACK_PICTURES = (
    ("crying cat", "pink", "crying sks cat"),
    ("pouting cat", "yellow", "pouting sks cat"),
    ("weary cat", "green", "weary sks cat"),
    ("kissing cat", "grey", "kissing sks cat"),
)
EVALUATION_PROMPTS = (
    "a 3d emoji of a sks cat on a blue background",
    "a 3d emoji of a sks cat on a red background",
    "a 3d emoji of a sks cat on a yellow background",
    "a 3d emoji of a sks cat on a green background",
    "a 3d emoji of a sks cat on a black background",
    "a 3d emoji of a sks cat on an orange background",
    "a 3d emoji of a crying sks cat on a white background",
    "a 3d emoji of a kissing sks cat on a pink background",
)
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


def write_picture(folders: Folders, emoji: Emoji, colour: str, path: Path) -> None:
    """Draw a Fluent 3D picture at full size on a plain background.

    Args:
        folders: Where the build works.
        emoji: Which.
        colour: Name of the background.
        path: Where it goes.
    """
    picture = render_emoji(folders, ARTWORKS[0], emoji)
    pixels = composite(premultiplied(picture, RENDER_SIZE), COLOURS[colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, optimize=True)


def write_subjects(folders: Folders) -> None:
    """Write the cat: pictures to learn, held-back pictures, prompts and licence.

    Args:
        folders: Where the build works.
    """
    target = folders.subjects / "fluent-cat"
    emoji = {item.name: item for item in all_emoji(folders)}
    pictures = {}
    for part, entries in (("instance", INSTANCE_PICTURES), ("held_back", HELD_BACK_PICTURES)):
        pictures[part] = []
        for name, colour, words in entries:
            file_name = f"{part}/{name.replace(' ', '-')}.png"
            write_picture(folders, emoji[name], colour, target / file_name)
            entry = {"file": file_name, "name": name, "background": colour}
            entry["prompt"] = f"a 3d emoji of a {words}{background(colour)}"
            entry["plain_prompt"] = INSTANCE_PROMPT + background(colour)
            pictures[part].append(entry)
    subject = {
        "name": "fluent-cat",
        "instance_prompt": INSTANCE_PROMPT,
        "class_prompt": CLASS_PROMPT,
        "background_colours": COLOURS,
        **pictures,
        "evaluation_prompts": EVALUATION_PROMPTS,
        "drift_prompts": DRIFT_PROMPTS,
    }
    (target / "subject.json").write_text(json.dumps(subject, indent=2) + "\n")
    (target / "LICENSE").write_text(FLUENT_LICENCE)
    (target / "README.md").write_text(subject_card())
