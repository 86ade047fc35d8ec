"""Stages "text" and "diffusion": the text encoder's warm-up, then the denoiser together with the text encoder."""

import json
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .autoencoder import encode_all
from .captions import CaptionTable
from .names import all_emoji, is_held_back, read_vocabulary
from .pictures import Compositor
from .render import Pictures, load_pictures
from .settings import COLOURS, CONTEXT_LENGTH, PICTURE_SIZE, Folders
from .tokenizer import load_tokenizer
from .training import Stage, make_optimizer

TEXT_WIDTH = 256
EMPTY_CAPTION_RATE = 0.1
SNR_LIMIT = 5.0
EMA_DECAY = 0.998
WEIGHT_DECAY = 0.05
PCA_COEFFICIENTS = 64
# A vocabulary's denoiser and text encoder go on from those of a smaller one, which learned its names in a quarter of the time.
STARTS_FROM = {"medium": "small"}


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of 4.0 M parameters.

    Args:
        tokenizer: The tokenizer it is for.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 11.2 M parameters: plain at 16 x 16, with cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // 4,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def noise_scheduler() -> DDPMScheduler:
    """How training adds noise."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )


def training_pictures(folders: Folders) -> Pictures:
    """The pictures that the base and CLIP learn: those of the vocabulary without the held-back ones.

    Args:
        folders: Where the build works.
    """
    pictures = load_pictures(folders)
    wanted = set(read_vocabulary(folders.vocabulary, all_emoji(folders)))
    pairs = enumerate(zip(pictures.names, pictures.styles, strict=True))
    return pictures.subset([i for i, (name, style) in pairs if name in wanted and not is_held_back(name, style)])


@dataclass
class LatentData:
    """What the denoiser is trained on, in memory.

    Args:
        latents: Latents, `[pictures, colours, channels, height, width]`.
        captions: Token ids of their captions.
        lots: Indices of the pictures to draw from; a picture that stands in it twice comes twice as often.
    """

    latents: torch.Tensor
    captions: CaptionTable
    lots: torch.Tensor

    @classmethod
    def build(cls, folders: Folders) -> "LatentData":
        """Encode all pictures on all backgrounds; those that an earlier vocabulary knew are drawn half as often as new ones.

        Args:
            folders: Where the build works.
        """
        pictures = training_pictures(folders)
        autoencoder = AutoencoderKL.from_pretrained(folders.stage("autoencoder") / "model")
        latents = encode_all(autoencoder, Compositor(pictures))
        first, emoji = first_course(folders), all_emoji(folders)
        known = set() if first == folders else set(read_vocabulary(first.vocabulary, emoji))
        new = [i for i, name in enumerate(pictures.names) if name not in known]
        lots = torch.tensor([*range(len(pictures.names)), *new])
        return cls(latents, CaptionTable(pictures, emoji, load_tokenizer(folders)), lots)

    def draw(self, count: int, empty_rate: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents with a caption each.

        Args:
            count: How many.
            empty_rate: How often the caption is empty.
        """
        picture = self.lots[torch.randint(len(self.lots), (count,))]
        colour = torch.randint(len(COLOURS), (count,))
        return self.latents[picture, colour], self.captions.draw(picture, colour, empty_rate)


def warm_up_text_encoder(folders: Folders, steps: int, batch_size: int = 64) -> None:
    """Teach the text encoder to tell the main components of a picture from its caption, with the first vocabulary.

    Args:
        folders: Where the build works.
        steps: Steps in all.
        batch_size: Captions a step.
    """
    torch.manual_seed(1)
    folders = first_course(folders)
    folder = folders.stage("text")
    if (folder / "report.json").exists():
        return
    data = LatentData.build(folders)
    flat = data.latents.flatten(2).flatten(0, 1)
    mean = flat.mean(0)
    components = torch.pca_lowrank(flat[torch.randperm(len(flat))[:4000]], PCA_COEFFICIENTS)[2]
    deviation = ((flat - mean) @ components).std(0)
    text_encoder = build_text_encoder(load_tokenizer(folders))
    head = torch.nn.Linear(TEXT_WIDTH, PCA_COEFFICIENTS)
    optimizer, schedule = make_optimizer([(text_encoder, 3e-4), (head, 1e-3)], steps, WEIGHT_DECAY)
    parts = {"text_encoder": text_encoder, "head": head, "optimizer": optimizer, "schedule": schedule}
    stage = Stage(folder, steps, batch_size, parts)

    def train_step(_: int) -> torch.Tensor:
        latents, ids = data.draw(batch_size)
        target = ((latents.flatten(1) - mean) @ components) / deviation
        with torch.autocast("cpu", torch.bfloat16):
            guess = head(text_encoder(ids).pooler_output)
        loss = F.mse_loss(guess.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    stage.run(train_step)
    text_encoder.save_pretrained(folder / "model")
    report = stage.report()
    (folder / "report.json").write_text(json.dumps(report, indent=1))


def first_course(folders: Folders) -> Folders:
    """The same folders for the vocabulary that is learned first; itself where there is no other.

    Args:
        folders: Where the build works.
    """
    return replace(folders, vocabulary=STARTS_FROM.get(folders.vocabulary, folders.vocabulary))


def starting_models(folders: Folders) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The denoiser and the text encoder that the training begins with.

    Args:
        folders: Where the build works.
    """
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    first = first_course(folders)
    if first == folders:
        return build_unet(), CLIPTextModel.from_pretrained(folders.stage("text") / "model", **options)
    trained = first.stage("diffusion")
    unet = UNet2DConditionModel.from_pretrained(trained / "unet")
    return unet, CLIPTextModel.from_pretrained(trained / "text_encoder", **options)


class DiffusionTrainer:
    """The denoiser and the text encoder in training, with their moving averages.

    Args:
        folders: Where the build works.
        steps: Steps in all.
        batch_size: Latents a step.
    """

    def __init__(self, folders: Folders, steps: int, batch_size: int) -> None:
        torch.manual_seed(2)
        self.data = LatentData.build(folders)
        unet, self.text_encoder = starting_models(folders)
        self.unet = unet.to(memory_format=torch.channels_last)
        # On a CPU, attention as plain matrix products trains a quarter faster than the fused kernel at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        self.scheduler = noise_scheduler()
        self.averages = {
            "unet_average": EMAModel(self.unet.parameters(), decay=EMA_DECAY),
            "text_average": EMAModel(self.text_encoder.parameters(), decay=EMA_DECAY),
        }
        groups = [(self.unet, 8e-4), (self.text_encoder, 2e-4)]
        self.optimizer, self.schedule = make_optimizer(groups, steps, WEIGHT_DECAY)
        self.batch_size = batch_size
        parts = {"unet": self.unet, "text_encoder": self.text_encoder, **self.averages}
        parts |= {"optimizer": self.optimizer, "schedule": self.schedule}
        self.stage = Stage(folders.stage("diffusion"), steps, batch_size, parts)

    def loss(self) -> torch.Tensor:
        """Error of the predicted velocity on a random batch, weighted by min-SNR."""
        latents, ids = self.data.draw(self.batch_size, EMPTY_CAPTION_RATE)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (self.batch_size,))
        noisy = self.scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.text_encoder(ids).last_hidden_state
            guess = self.unet(noisy, timesteps, states).sample
        snr = compute_snr(self.scheduler, timesteps)
        weight = snr.clamp(max=SNR_LIMIT) / (snr + 1)
        # Divided by its mean, so that the figure compares with an unweighted error.
        error = (guess.float() - velocity).square().mean((1, 2, 3))
        return (weight / weight.mean() * error).mean()

    def train_step(self, _: int) -> torch.Tensor:
        """One step; returns the loss."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.unet.parameters(), *self.text_encoder.parameters()], 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.averages["unet_average"].step(self.unet.parameters())
        self.averages["text_average"].step(self.text_encoder.parameters())
        return loss.detach()

    def averaged(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """The models with their averaged weights; the trained ones are overwritten."""
        self.averages["unet_average"].copy_to(self.unet.parameters())
        self.averages["text_average"].copy_to(self.text_encoder.parameters())
        return self.unet.eval(), self.text_encoder.eval()


def train_diffusion(folders: Folders, first_steps: int, steps: int, batch_size: int = 64) -> None:
    """Train the denoiser and write the averaged models.

    Args:
        folders: Where the build works.
        first_steps: Steps of the first vocabulary, where another goes before this one.
        steps: Steps of this vocabulary.
        batch_size: Latents a step.
    """
    folder = folders.stage("diffusion")
    if (folder / "report.json").exists():
        return
    first = first_course(folders)
    if first != folders:
        train_diffusion(first, first_steps, first_steps, batch_size)
    trainer = DiffusionTrainer(folders, steps, batch_size)
    trainer.stage.run(trainer.train_step)
    unet, text_encoder = trainer.averaged()
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    report = trainer.stage.report()
    report["pictures"] = len(trainer.data.latents)
    report["visits_per_picture"] = report["samples"] / report["pictures"]
    (folder / "report.json").write_text(json.dumps(report, indent=1))
