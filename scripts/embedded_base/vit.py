"""Stage "vit": a small vision transformer that tells the groups of emoji apart, for the classification entry points."""

import json

import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from .disturbance import disturbed
from .names import Emoji, all_emoji, is_held_back
from .pictures import Compositor
from .render import Pictures, load_pictures
from .settings import COLOURS, PICTURE_SIZE, Folders
from .training import Stage, make_optimizer

WIDTH = 192
PATCH_SIZE = 8
HELD_OUT_EVERY = 10


def build_vit(groups: list[str]) -> ViTForImageClassification:
    """An untrained vision transformer of 2.7 M parameters.

    Args:
        groups: Names of the classes.
    """
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=PICTURE_SIZE,
        patch_size=PATCH_SIZE,
        id2label=dict(enumerate(groups)),
        label2id={group: number for number, group in enumerate(groups)},
    )
    return ViTForImageClassification(config)


def split_names(pictures: Pictures, emoji: list[Emoji]) -> tuple[Pictures, Pictures]:
    """Pictures to learn and pictures of held-out names, both without the subjects of personalisation.

    Args:
        pictures: All pictures.
        emoji: All emoji; every tenth name is held out, in all its styles.
    """
    held_out = {item.name for item in emoji[::HELD_OUT_EVERY]}
    pairs = list(enumerate(zip(pictures.names, pictures.styles, strict=True)))
    usable = [(i, name) for i, (name, style) in pairs if not is_held_back(name, style)]
    learned = [i for i, name in usable if name not in held_out]
    return pictures.subset(learned), pictures.subset([i for i, name in usable if name in held_out])


class LabelledPictures:
    """Pictures on backgrounds with the number of their group.

    Args:
        pictures: The pictures.
        emoji: All emoji, for their groups.
        groups: Names of the groups, in the order of their numbers.
    """

    def __init__(self, pictures: Pictures, emoji: list[Emoji], groups: list[str]) -> None:
        group = {item.name: groups.index(item.group) for item in emoji}
        self.compositor = Compositor(pictures)
        self.labels = torch.tensor([group[name] for name in pictures.names])

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random disturbed pictures on random backgrounds, and their groups.

        Args:
            count: How many.
        """
        picture = torch.randint(len(self.labels), (count,))
        colour = torch.randint(len(COLOURS), (count,))
        return disturbed(self.compositor(picture, colour)), self.labels[picture]

    @torch.no_grad()
    def accuracy(self, vit: ViTForImageClassification) -> float:
        """Share of the pictures, each on one background, whose group the model names.

        Args:
            vit: The model.
        """
        right = 0
        for chunk in torch.arange(len(self.labels)).split(100):
            guess = vit(pixel_values=self.compositor(chunk, chunk % len(COLOURS))).logits.argmax(-1)
            right += int((guess == self.labels[chunk]).sum())
        return right / len(self.labels)


def train_vit(folders: Folders, steps: int, batch_size: int = 128) -> None:
    """Train on the pictures of all names but a tenth, and write the model, unless it is there.

    Args:
        folders: Where the build works.
        steps: Steps in all.
        batch_size: Pictures a step.
    """
    torch.manual_seed(4)
    folder = folders.stage("vit")
    if (folder / "report.json").exists():
        return
    emoji = all_emoji(folders)
    groups = list(dict.fromkeys(item.group for item in emoji))
    shown, held_out = (LabelledPictures(part, emoji, groups) for part in split_names(load_pictures(folders), emoji))
    vit = build_vit(groups)
    vit.set_attn_implementation("eager")  # faster in training on a CPU than the fused kernel, at these sizes
    optimizer, schedule = make_optimizer([(vit, 5e-4)], steps, weight_decay=0.1)
    stage = Stage(folder, steps, batch_size, {"vit": vit, "optimizer": optimizer, "schedule": schedule})

    def train_step(_: int) -> torch.Tensor:
        pictures, labels = shown.draw(batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            logits = vit(pixel_values=pictures).logits
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.detach()

    stage.run(train_step)
    vit.eval()
    report = stage.report() | {"pictures": len(shown.labels), "held_out_pictures": len(held_out.labels)}
    report |= {"accuracy_shown": shown.accuracy(vit), "accuracy_held_out": held_out.accuracy(vit)}
    report["largest_group"] = (torch.bincount(held_out.labels).max() / len(held_out.labels)).item()
    vit.save_pretrained(folder / "model")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(report)


def export_vit(folders: Folders) -> None:
    """Write the model in half precision with its processor.

    Args:
        folders: Where the build works.
    """
    vit = ViTForImageClassification.from_pretrained(folders.stage("vit") / "model", dtype=torch.float16)
    vit.save_pretrained(folders.vit)
    ViTImageProcessor(size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}).save_pretrained(folders.vit)
    (folders.vit / "model.safetensors").chmod(0o644)
