"""Stage "clip": a small CLIP that scores pictures; it shares no weights with the base.

It learns in two courses: the names of the vocabulary, then every name there is. What more names teach is which shapes make a
name whatever the look, and that is what a picture in a look never seen with its name is recognised by.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from .captions import CaptionTable
from .clip_scores import accuracies, averaged_accuracies, held_back_cats, normalised
from .diffusion import training_pictures
from .disturbance import disturbed
from .names import all_emoji, is_held_back
from .pictures import Compositor
from .render import Pictures, load_pictures
from .settings import COLOURS, CONTEXT_LENGTH, PICTURE_SIZE, STYLES, Folders
from .tokenizer import load_tokenizer
from .training import Stage, make_optimizer

WIDTH = 192
PATCH_SIZE = 8
UNPAIRED = 100
ANY_LOOK_RATE = 0.35


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


def unpaired_pictures(pictures: Pictures) -> set[tuple[str, str]]:
    """Name and style of pictures that no course shows; their names are learned in the other styles only.

    A hundred names, evenly spaced among those that have every style, miss one style each; the four styles take turns.

    Args:
        pictures: The pictures of the vocabulary.
    """
    complete = sorted(name for name, count in Counter(pictures.names).items() if count == len(STYLES))
    chosen = [complete[number * len(complete) // UNPAIRED] for number in range(min(UNPAIRED, len(complete)))]
    return {(name, STYLES[number % len(STYLES)]) for number, name in enumerate(chosen)}


def without(pictures: Pictures, pairs: set[tuple[str, str]]) -> tuple[Pictures, Pictures]:
    """The other pictures, and those of the pairs.

    Args:
        pictures: Pictures.
        pairs: Names and styles.
    """
    chosen = [pair in pairs for pair in zip(pictures.names, pictures.styles, strict=True)]
    indices = range(len(chosen))
    return pictures.subset([i for i in indices if not chosen[i]]), pictures.subset([i for i in indices if chosen[i]])


def every_picture(folders: Folders) -> Pictures:
    """The pictures of all names without the subjects of personalisation.

    Args:
        folders: Where the build works.
    """
    pictures = load_pictures(folders)
    pairs = enumerate(zip(pictures.names, pictures.styles, strict=True))
    return pictures.subset([i for i, (name, style) in pairs if not is_held_back(name, style)])


@dataclass(frozen=True)
class Course:
    """One of the two courses.

    Args:
        folder: Work folder.
        pictures: What is learned.
        steps: Steps in all.
        batch_size: Pairs a step.
        any_look_rate: How often a caption says no look, beyond the templates' own share.
    """

    folder: Path
    pictures: Pictures
    steps: int
    batch_size: int
    any_look_rate: float

    def run(self, clip: CLIPModel, captions: CaptionTable) -> dict[str, float]:
        """Train a model in place; returns the figures of the training.

        Args:
            clip: The model.
            captions: Of the pictures.
        """
        clip.set_attn_implementation("eager")  # on a CPU three fifths faster in training than the fused kernel, at these sizes
        optimizer, schedule = make_optimizer([(clip, 1e-3)], self.steps, weight_decay=0.05)
        parts = {"clip": clip, "optimizer": optimizer, "schedule": schedule}
        stage = Stage(self.folder, self.steps, self.batch_size, parts)
        compositor = Compositor(self.pictures)
        styles = torch.tensor([STYLES.index(style) for style in self.pictures.styles])

        def train_step(_: int) -> torch.Tensor:
            picture, colour = draw_batch(styles, self.batch_size)
            images = normalised(disturbed(compositor(picture, colour)))
            loss = contrastive_loss(clip, images, captions.draw(picture, colour, any_look_rate=self.any_look_rate))
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
        clip.save_pretrained(self.folder / "model")
        return stage.report()


def train_clip(folders: Folders, first_steps: int, steps: int, batch_size: int = 128) -> None:
    """Train CLIP on the base's pictures, then on those of all names, and write it, unless it is there.

    Args:
        folders: Where the build works.
        first_steps: Steps of the first course.
        steps: Steps of the second.
        batch_size: Pairs a step.
    """
    torch.manual_seed(3)
    folder = folders.stage("clip")
    if (folder / "report.json").exists():
        return
    tokenizer, emoji = load_tokenizer(folders), all_emoji(folders)
    vocabulary = training_pictures(folders)
    pairs = unpaired_pictures(vocabulary)
    first = Course(folders.stage("first-clip"), without(vocabulary, pairs)[0], first_steps, batch_size, any_look_rate=0.0)
    second = Course(folder, without(every_picture(folders), pairs)[0], steps, batch_size, any_look_rate=ANY_LOOK_RATE)
    if not (first.folder / "model").exists():
        first.run(build_clip(tokenizer), CaptionTable(first.pictures, emoji, tokenizer))
    clip = CLIPModel.from_pretrained(first.folder / "model", dtype=torch.float32).train()
    report = second.run(clip, CaptionTable(second.pictures, emoji, tokenizer))
    report["first_samples"] = first_steps * batch_size
    for pictures, prefix in (
        (first.pictures, "shown"),
        (held_back_cats(folders), "held_back_cats"),
        (without(vocabulary, pairs)[1], "unpaired"),
    ):
        report |= accuracies(clip, tokenizer, pictures, prefix)
    report |= averaged_accuracies(clip, tokenizer, without(vocabulary, pairs)[1], "unpaired")
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
