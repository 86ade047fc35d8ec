"""CLIPScore: right by hand, the same from both libraries, and higher where prompt and picture belong together."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from cersa_diffusion import ConfigError
from cersa_diffusion.metrics.clip_models import OpenClipModel, TransformersClip, to_open_clip
from cersa_diffusion.metrics.clipscore import HESSEL, clipscore_open_clip, clipscore_torchmetrics

from ..conftest import raises, warns


@pytest.fixture(params=["torchmetrics", "open_clip"])
def scored(request, clip, open_clip_model):
    """(function, model) of a backend."""
    return {
        "torchmetrics": (clipscore_torchmetrics, clip),
        "open_clip": (clipscore_open_clip, open_clip_model),
    }[request.param]


def by_hand(clip_path, pictures, prompts) -> np.ndarray:
    """100 * max(cos, 0) from transformers' own forward pass on pixels prepared with PIL and numpy."""
    model, tokenizer = CLIPModel.from_pretrained(clip_path, dtype=torch.float32), AutoTokenizer.from_pretrained(clip_path)
    settings = json.loads((clip_path / "preprocessor_config.json").read_text())
    mean, std = (np.array(settings[name], dtype=np.float32) for name in ("image_mean", "image_std"))
    # The pictures are squares: resizing is all there is to do.
    small = [np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 255 for picture in pictures]
    pixels = torch.from_numpy(np.stack([(array - mean) / std for array in small])).permute(0, 3, 1, 2)
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokenizer(prompts, padding=True, return_tensors="pt"))
    return 100 * (output.image_embeds * output.text_embeds).sum(-1).clamp_min(0).numpy()


def test_score_is_a_hundred_times_the_cosine_of_the_embeddings(scored, clip_path, pictures, prompts):
    score, model = scored
    # Prompts of other pictures among them, whose cosine may be negative.
    mixed = prompts[:5] + prompts[-5:]
    expected = by_hand(clip_path, pictures[:10], mixed)
    assert score(pictures[:10], mixed, model) == pytest.approx(expected, abs=1e-3)


def test_both_backends_agree_whatever_the_shape_of_the_picture(clip, open_clip_model, pictures, prompts):
    shapes = [(256, 256), (100, 77), (91, 300), (64, 64), (33, 41), (640, 479)]
    shaped = [picture.resize(shapes[i % len(shapes)]) for i, picture in enumerate(pictures)]
    first = clipscore_torchmetrics(shaped, prompts, clip)
    second = clipscore_open_clip(shaped, prompts, open_clip_model)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-3
    assert np.std(first) > 1


def test_weight_of_hessel(scored, pictures, prompts):
    score, model = scored
    percent = score(pictures[:4], prompts[:4], model)
    weighted = score(pictures[:4], prompts[:4], model, weight=HESSEL)
    assert weighted == pytest.approx([2.5 * value / 100 for value in percent], rel=1e-6)


def test_batches_change_nothing(scored, pictures, prompts):
    score, model = scored
    at_once = score(pictures[:7], prompts[:7], model, batch_size=7)
    assert score(pictures[:7], prompts[:7], model, batch_size=3) == pytest.approx(at_once, abs=1e-4)


def test_a_negative_cosine_scores_zero_and_does_not_pull_others_down(scored, pictures, prompts, clip):
    score, model = scored
    cosines = clip.embed_pictures(pictures) @ clip.embed_texts(prompts).T
    picture, prompt = divmod(int(cosines.argmin()), len(prompts))
    assert cosines[picture, prompt] < 0
    both = score([pictures[picture], pictures[0]], [prompts[prompt], prompts[0]], model)
    assert both[0] == 0 and both[1] == pytest.approx(score(pictures[:1], prompts[:1], model)[0], abs=1e-4)


def test_a_matching_prompt_scores_above_mismatched_ones(open_clip_model, pictures, prompts):
    different = sorted(set(prompts))
    cosines = open_clip_model.embed_pictures(pictures) @ open_clip_model.embed_texts(different).T
    wins = [
        cosines[number, different.index(right)] > cosines[number, other]
        for number, right in enumerate(prompts)
        for other, prompt in enumerate(different)
        if prompt != right
    ]
    assert np.mean(wins) >= 0.9


def test_long_prompts_are_cut_with_a_warning_that_counts_them(scored, pictures, clip):
    score, model = scored
    fitting = "a 3d emoji of a cat on a white background"
    words = fitting.split()
    long = " ".join((words * 5)[:40])
    with warns(UserWarning, "CLIP", "1 of 2", "24", fitting):
        scores = score(pictures[:2], [fitting, long], model)
    # What is left is the beginning, with the end-of-text token behind it.
    cut = next(text for n in range(40, 0, -1) if clip.count_tokens(text := " ".join((words * 5)[:n])) <= clip.context_length)
    assert clip.count_tokens(cut) == clip.context_length, "the words chosen here are one token each"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(pictures[:2], [fitting, cut], model) == pytest.approx(scores, abs=1e-4)


def test_as_many_prompts_as_pictures(scored, pictures, prompts):
    score, model = scored
    with raises(ConfigError, "2", "1"):
        score(pictures[:2], prompts[:1], model)
    with raises(ConfigError, "0"):
        score([], [], model)


def test_models_that_cannot_be_loaded(tmp_path):
    with raises(ConfigError, "CLIP"):
        TransformersClip(tmp_path)
    with raises(ConfigError, "ARCHITECTURE:PRETRAINED"):
        OpenClipModel("no-such-model")
    with raises(ConfigError, "no-such-architecture:openai", "open_clip"):
        OpenClipModel("no-such-architecture:openai")


@pytest.mark.parametrize("end_of_text", [2, 63], ids=["as in OpenAI's configurations", "its own"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_open_clip_gives_the_same_vectors_as_transformers(end_of_text, activation):
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared["hidden_act"] = activation
    text = shared | {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 62, "eos_token_id": end_of_text}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 8}, projection_dim=24)
    ).eval()
    ids = torch.tensor([[62, 5, 2, 9, 63, 63, 63, 63], [62, 7, 63, 63, 63, 63, 63, 63]])
    pixels = torch.randn(2, 3, 16, 16)
    converted = to_open_clip(model).eval()
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(converted.encode_text(ids, normalize=True), output.text_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(converted.encode_image(pixels, normalize=True), output.image_embeds, atol=1e-5, rtol=0)


def test_a_model_that_open_clip_loads_itself(clip, clip_path, pictures, prompts, tmp_path):
    """The embedded CLIP written as open_clip writes its models, tokenizer included."""
    text, vision = clip.model.config.text_config, clip.model.config.vision_config
    width, size = vision.hidden_size, vision.image_size
    processor = json.loads((clip_path / "preprocessor_config.json").read_text())
    config = {
        "model_cfg": {
            "embed_dim": clip.model.config.projection_dim,
            "vision_cfg": {
                "image_size": size,
                "layers": vision.num_hidden_layers,
                "width": width,
                "patch_size": vision.patch_size,
            }
            | {"head_width": width // vision.num_attention_heads},
            "text_cfg": {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size}
            | {
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "hf_tokenizer_name": "own",
                "pool_type": "eos",
            }
            | {"eos_id": text.eos_token_id},
        },
        "preprocess_cfg": {
            "size": size,
            "mean": processor["image_mean"],
            "std": processor["image_std"],
            "resize_mode": "shortest",
        },
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    state = to_open_clip(clip.model).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "open_clip_model.safetensors")
    clip.tokenizer.save_pretrained(tmp_path)
    loaded = OpenClipModel(f"local-dir:{tmp_path}")
    assert loaded.context_length == clip.context_length and loaded.count_tokens(prompts[0]) == clip.count_tokens(prompts[0])
    expected = clipscore_torchmetrics(pictures[:6], prompts[:6], clip)
    assert clipscore_open_clip(pictures[:6], prompts[:6], loaded) == pytest.approx(expected, abs=1e-3)


@pytest.mark.gpu
def test_scores_on_the_gpu(clip_path, pictures, prompts):
    expected = by_hand(clip_path, pictures[:4], prompts[:4])
    for score, kind in ((clipscore_torchmetrics, TransformersClip), (clipscore_open_clip, OpenClipModel)):
        model = kind(clip_path)
        assert model.device.type == "cuda"
        assert score(pictures[:4], prompts[:4], model) == pytest.approx(expected, abs=0.1)
