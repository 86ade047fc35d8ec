"""The prompt lists of DreamBooth: as many as the paper has, well-formed, with the subject in each."""

import pytest

from cersa_diffusion import ConfigError
from cersa_diffusion.metrics.prompts import PROMPT_LISTS, dreambooth_prompts, without_token

from ..conftest import raises


@pytest.mark.parametrize("kind", list(PROMPT_LISTS))
def test_twenty_five_different_prompts_about_the_subject(kind):
    prompts = dreambooth_prompts(kind, "sks dog")
    assert len(prompts) == len(set(prompts)) == 25
    assert all(prompt.count("sks dog") == 1 and "{" not in prompt for prompt in prompts)
    assert all(prompt.startswith("a ") for prompt in prompts)


def test_the_lists_share_places_and_properties_and_differ_in_ten():
    objects, live = (set(dreambooth_prompts(kind, "sks dog")) for kind in ("object", "live_subject"))
    assert len(objects & live) == 15
    assert {"a sks dog floating in an ocean of milk", "a sks dog on top of a white rug"} <= objects - live
    assert {"a sks dog in a purple wizard outfit", "a sks dog wearing pink glasses"} <= live - objects


def test_unknown_list_and_empty_subject():
    with raises(ConfigError, "landscape", "object", "live_subject"):
        dreambooth_prompts("landscape", "sks dog")
    with raises(ConfigError, "subject"):
        dreambooth_prompts("object", " ")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sks dog in the jungle", "a dog in the jungle"),
        ("sks dog", "dog"),
        ("a dog, sks", "a dog,"),
        ("a sksy dog", "a sksy dog"),
        ("a dog", "a dog"),
    ],
)
def test_the_unique_token_is_left_out_as_a_word(prompt, expected):
    assert without_token(prompt, "sks") == expected
