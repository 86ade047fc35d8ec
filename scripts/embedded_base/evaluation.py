"""Stage "evaluate": how well the trained base draws what it is asked for, as the scoring CLIP sees it."""

import json
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPModel

from .captions import background, encode, look, with_article
from .clip_scores import CAPTION_FORMS, normalised, similarities
from .diffusion import training_pictures
from .pictures import Compositor
from .pipeline import SAMPLE_GUIDANCE, draw_samples, load_pipeline
from .settings import COLOURS, PICTURE_SIZE, STYLES, Folders
from .tokenizer import load_tokenizer

NAMES = 100
TIMED_STEPS = 20


def caption(name: str, style: str, colour: str, form: str = CAPTION_FORMS[0]) -> str:
    """The caption of a picture.

    Args:
        name: Name of the emoji.
        style: Look.
        colour: Name of the background.
        form: One of `CAPTION_FORMS`; the first is the one that the base was trained on most.
    """
    return form.format(look=look(style), name=with_article(name), background=background(colour))


class Judge:
    """Tells the names of pictures among a fixed list, when look and background are known.

    Args:
        folders: Where the build works.
        names: The names to choose from.
    """

    def __init__(self, folders: Folders, names: list[str]) -> None:
        self.clip = CLIPModel.from_pretrained(folders.stage("clip") / "model", dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(folders)
        self.names = names

    def scores(self, pictures: torch.Tensor, styles: list[str], colours: list[str]) -> torch.Tensor:
        """CLIP's cosines, `[forms, pictures, names]`, for every one of `CAPTION_FORMS`.

        Args:
            pictures: Pictures between -1 and 1.
            styles: Look of each.
            colours: Background of each.
        """
        rows = torch.empty(len(CAPTION_FORMS), len(pictures), len(self.names))
        for style in STYLES:
            for colour in COLOURS:
                chosen = [i for i, pair in enumerate(zip(styles, colours, strict=True)) if pair == (style, colour)]
                if chosen:
                    texts = [caption(name, style, colour, form) for form in CAPTION_FORMS for name in self.names]
                    found = similarities(self.clip, normalised(pictures[chosen]), encode(self.tokenizer, texts))
                    rows[:, chosen] = found.view(len(chosen), len(CAPTION_FORMS), -1).transpose(0, 1)
        return rows


def recognition(scores: torch.Tensor, right: torch.Tensor, prefix: str) -> dict[str, float]:
    """How often the right name is found, with one form of captions and with the cosines of all forms averaged.

    Args:
        scores: Cosines, `[forms, pictures, names]`.
        right: Number of the right name of each picture.
        prefix: Put before the names of the figures.
    """
    return _recognition(scores[0], right, prefix) | _recognition(scores.mean(0), right, f"{prefix}_averaged")


def _recognition(scores: torch.Tensor, right: torch.Tensor, prefix: str) -> dict[str, float]:
    number = torch.arange(len(scores))
    own = scores[number, right]
    generator = torch.Generator().manual_seed(0)
    other = (right + torch.randint(1, scores.shape[1], right.shape, generator=generator)) % scores.shape[1]
    place = (scores > own[:, None]).sum(1)
    return {
        f"{prefix}_top1": (place == 0).float().mean().item(),
        f"{prefix}_top5": (place < 5).float().mean().item(),
        f"{prefix}_matched_above_mismatched": (own > scores[number, other]).float().mean().item(),
        f"{prefix}_matched_score": 100 * own.clamp(min=0).mean().item(),
        f"{prefix}_mismatched_score": 100 * scores[number, other].clamp(min=0).mean().item(),
    }


def seconds_a_picture(pipeline: StableDiffusionPipeline) -> float:
    """Seconds for one picture of 20 steps of DPM++ with guidance; the best of three.

    Args:
        pipeline: The pipeline; its scheduler is put back.
    """
    own = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    options = {
        "num_inference_steps": TIMED_STEPS,
        "guidance_scale": SAMPLE_GUIDANCE,
        "height": PICTURE_SIZE,
        "width": PICTURE_SIZE,
    }
    times = []
    for _ in range(3):
        start = time.perf_counter()
        pipeline("a 3d emoji of a fox on a blue background", **options)
        times.append(time.perf_counter() - start)
    pipeline.scheduler = own
    return min(times)


def evaluate(folders: Folders, pipeline_path: Path) -> dict[str, float]:
    """Draw four hundred pictures and let CLIP name them, beside the real pictures; written as a report.

    Args:
        folders: Where the build works.
        pipeline_path: Folder of the pipeline.
    """
    pictures = training_pictures(folders)
    every = sorted(set(pictures.names))
    names = [every[number * len(every) // NAMES] for number in range(NAMES)]
    number = {pair: i for i, pair in enumerate(zip(pictures.names, pictures.styles, strict=True))}
    pairs = [(name, style) for style in STYLES for name in names]
    colours = [list(COLOURS)[i % len(COLOURS)] for i in range(len(pairs))]
    prompts = [caption(name, style, colour) for (name, style), colour in zip(pairs, colours, strict=True)]
    pipeline = load_pipeline(pipeline_path)
    drawn = torch.stack([pil_to_tensor(picture) for picture in draw_samples(pipeline, prompts)]) / 127.5 - 1
    judge = Judge(folders, names)
    right = torch.tensor([names.index(name) for name, _ in pairs])
    report = recognition(judge.scores(drawn, [style for _, style in pairs], colours), right, "drawn")
    known = [i for i, pair in enumerate(pairs) if pair in number]
    colour_numbers = torch.tensor([list(COLOURS).index(colours[i]) for i in known])
    real = Compositor(pictures)(torch.tensor([number[pairs[i]] for i in known]), colour_numbers)
    scores = judge.scores(real, [pairs[i][1] for i in known], [colours[i] for i in known])
    report |= recognition(scores, right[known], "real")
    report |= {"drawn_pictures": len(pairs), "real_pictures": len(known), "seconds_a_picture": seconds_a_picture(pipeline)}
    (folders.stage("evaluation") / "report.json").write_text(json.dumps(report, indent=1))
    print(report)
    return report
