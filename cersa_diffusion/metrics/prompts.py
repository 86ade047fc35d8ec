"""The evaluation prompts of DreamBooth: 25 for objects, 25 for live subjects.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", CVPR 2023 (arXiv 2208.12242);
the lists come from `dataset/prompts_and_classes.txt` in github.com/google/dreambooth. `{subject}` replaces its "{0} {1}", the
unique token and the class noun: "sks dog" to draw, and "dog" to score with a CLIP, which does not know the token.
"""

import re

from cersa_diffusion.errors import ConfigError

# Both lists begin with these ten places and end with these five properties.
_PLACES = (
    "a {subject} in the jungle",
    "a {subject} in the snow",
    "a {subject} on the beach",
    "a {subject} on a cobblestone street",
    "a {subject} on top of pink fabric",
    "a {subject} on top of a wooden floor",
    "a {subject} with a city in the background",
    "a {subject} with a mountain in the background",
    "a {subject} with a blue house in the background",
    "a {subject} on top of a purple rug in a forest",
)
_PROPERTIES = ("a red {subject}", "a purple {subject}", "a shiny {subject}", "a wet {subject}", "a cube shaped {subject}")

OBJECT_PROMPTS = (
    *_PLACES,
    "a {subject} with a wheat field in the background",
    "a {subject} with a tree and autumn leaves in the background",
    "a {subject} with the Eiffel Tower in the background",
    "a {subject} floating on top of water",
    "a {subject} floating in an ocean of milk",
    "a {subject} on top of green grass with sunflowers around it",
    "a {subject} on top of a mirror",
    "a {subject} on top of the sidewalk in a crowded street",
    "a {subject} on top of a dirt road",
    "a {subject} on top of a white rug",
    *_PROPERTIES,
)
LIVE_SUBJECT_PROMPTS = (
    *_PLACES,
    "a {subject} wearing a red hat",
    "a {subject} wearing a santa hat",
    "a {subject} wearing a rainbow scarf",
    "a {subject} wearing a black top hat and a monocle",
    "a {subject} in a chef outfit",
    "a {subject} in a firefighter outfit",
    "a {subject} in a police outfit",
    "a {subject} wearing pink glasses",
    "a {subject} wearing a yellow shirt",
    "a {subject} in a purple wizard outfit",
    *_PROPERTIES,
)
PROMPT_LISTS = {"object": OBJECT_PROMPTS, "live_subject": LIVE_SUBJECT_PROMPTS}


def dreambooth_prompts(kind: str, subject: str) -> list[str]:
    """The 25 prompts of DreamBooth for a subject.

    Args:
        kind: "object" or "live_subject".
        subject: the unique token and the class noun ("sks dog"), or the class noun alone.

    Raises:
        ConfigError: the kind is unknown, or the subject is empty.
    """
    if kind not in PROMPT_LISTS:
        raise ConfigError(f"prompt list {kind!r}: expected one of {', '.join(PROMPT_LISTS)}")
    if not subject.strip():
        raise ConfigError("the subject is empty: expected the words to insert into the prompts, such as 'sks dog'")
    return [template.format(subject=subject.strip()) for template in PROMPT_LISTS[kind]]


def without_token(prompt: str, token: str) -> str:
    """A prompt without the unique token, a word that the scoring models do not know: "a sks dog" becomes "a dog"."""
    return " ".join(re.sub(rf"(?<!\S){re.escape(token)}(?!\S)", " ", prompt).split())
