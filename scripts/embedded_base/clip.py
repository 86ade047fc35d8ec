"""Stage "clip": a small CLIP that scores pictures; it shares no weights with the base."""

import json
from collections import Counter

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from .captions import CaptionTable
from .clip_scores import accuracies, held_back_cats, normalised
from .diffusion import training_pictures
from .disturbance import disturbed
from .names import all_emoji
from .pictures import Compositor
from .render import Pictures
from .settings import COLOURS, CONTEXT_LENGTH, PICTURE_SIZE, STYLES, Folders
from .tokenizer import load_tokenizer
from .training import Stage, make_optimizer

WIDTH = 192
PATCH_SIZE = 8
UNPAIRED = 100


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 4.9 M parameters.

    Args:
        tokenizer: The tokenizer it is for.
    """
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3, "hidden_act": "gelu"}
    text = {
        **shared,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": 6, "image_size": PICTURE_SIZE, "patch_size": PATCH_SIZE}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def contrastive_loss(clip: CLIPModel, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, in which equal captions count as equally right.

    Args:
        clip: The model.
        pictures: Normalised pictures.
        ids: Token ids of their captions.
    """
    with torch.autocast("cpu", torch.bfloat16):
        output = clip(input_ids=ids, pixel_values=pictures)
    logits = clip.logit_scale.exp() * output.image_embeds.float() @ output.text_embeds.float().T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def draw_batch(styles: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and backgrounds of a batch.

    Half of the batches keep to one style, and half to one background. Similar pictures teach names: where every picture
    has its own look and background, these alone tell them apart.

    Args:
        styles: Number of each picture's style.
        count: Pairs in the batch.
    """
    candidates = torch.arange(len(styles))
    colour = torch.randint(len(COLOURS), (count,))
    if torch.rand(()) < 0.5:
        candidates = candidates[styles == torch.randint(int(styles.max()) + 1, ())]
    if torch.rand(()) < 0.5:
        colour[:] = colour[0].item()
    picture = candidates[torch.randperm(len(candidates))[:count]]
    return picture, colour[: len(picture)]


def split_pairs(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """Pictures to learn, and pictures of names that are learned in the other styles only.

    A hundred names, evenly spaced among those that have every style, miss one style each; the four styles take turns.

    Args:
        pictures: All pictures.
    """
    complete = sorted(name for name, count in Counter(pictures.names).items() if count == len(STYLES))
    chosen = [complete[number * len(complete) // UNPAIRED] for number in range(min(UNPAIRED, len(complete)))]
    pairs = {(name, STYLES[number % len(STYLES)]) for number, name in enumerate(chosen)}
    kept_out = [pair in pairs for pair in zip(pictures.names, pictures.styles, strict=True)]
    indices = range(len(kept_out))
    return pictures.subset([i for i in indices if not kept_out[i]]), pictures.subset([i for i in indices if kept_out[i]])


def train_clip(folders: Folders, steps: int, batch_size: int = 128) -> None:
    """Train CLIP on the base's pictures and write it, unless it is there.

    Args:
        folders: Where the build works.
        steps: Steps in all.
        batch_size: Pairs a step.
    """
    torch.manual_seed(3)
    folder = folders.stage("clip")
    if (folder / "report.json").exists():
        return
    tokenizer = load_tokenizer(folders)
    pictures, unpaired = split_pairs(training_pictures(folders))
    compositor, captions = Compositor(pictures), CaptionTable(pictures, all_emoji(folders), tokenizer)
    clip = build_clip(tokenizer)
    clip.set_attn_implementation("eager")  # on a CPU three fifths faster in training than the fused kernel, at these sizes
    optimizer, schedule = make_optimizer([(clip, 1e-3)], steps, weight_decay=0.05)
    stage = Stage(folder, steps, batch_size, {"clip": clip, "optimizer": optimizer, "schedule": schedule})

    styles = torch.tensor([STYLES.index(style) for style in pictures.styles])

    def train_step(_: int) -> torch.Tensor:
        picture, colour = draw_batch(styles, batch_size)
        images = normalised(disturbed(compositor(picture, colour)))
        loss = contrastive_loss(clip, images, captions.draw(picture, colour))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=4.6)
        return loss.detach()

    stage.run(train_step)
    clip.eval()
    report = stage.report()
    report |= accuracies(clip, tokenizer, pictures, "shown")
    report |= accuracies(clip, tokenizer, held_back_cats(folders), "held_back_cats")
    report |= accuracies(clip, tokenizer, unpaired, "unpaired")
    clip.save_pretrained(folder / "model")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(report)


def export_clip(folders: Folders) -> None:
    """Write CLIP in half precision with its processor.

    Args:
        folders: Where the build works.
    """
    clip = CLIPModel.from_pretrained(folders.stage("clip") / "model", dtype=torch.float16)
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": PICTURE_SIZE}, crop_size=size)
    clip.save_pretrained(folders.clip)
    images.save_pretrained(folders.clip)
    CLIPProcessor(images, load_tokenizer(folders)).save_pretrained(folders.clip)
    (folders.clip / "model.safetensors").chmod(0o644)
