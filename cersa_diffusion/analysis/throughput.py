"""Training steps per second of several methods on the same layers, in one run and as ratios (CERSA, Fig. 9)."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.model import LONE_COMPONENT, trainable_parameters
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.methods.table import make_method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("full", "lora")
Inputs = Mapping[str, Tensor | dict[str, Tensor]]


def default_methods(alphas: Sequence[float], lora_ranks: Sequence[int]) -> dict[str, MethodSettings]:
    """Full fine-tuning, LoRA at some ranks, CERSA at some alphas: what Fig. 9 compares."""
    methods = {"full": MethodSettings(method="full")}
    methods |= {f"LoRA r={rank}": MethodSettings(method="lora", rank=rank) for rank in lora_ranks}
    return methods | {f"CERSA alpha={alpha:g}": MethodSettings(alpha=alpha) for alpha in alphas}


def random_inputs(model: nn.Module, batch: int, tokens: int | None = None) -> dict[str, Tensor | dict[str, Tensor]]:
    """Random inputs of one training step, on the model's device.

    Args:
        model: a ViT-like, BERT-like or UNet model of transformers or diffusers.
        batch: examples.
        tokens: length of the sentences, or of a UNet's prompts; default: 128, or 77. Pictures have the model's own size.

    Raises:
        ConfigError: no examples, or a model whose inputs are not known here.
    """
    if batch < 1:
        raise ConfigError(f"batch is {batch}, expected at least 1")
    config = getattr(model, "config", None)
    parameter = next(model.parameters())
    place = {"device": parameter.device, "dtype": parameter.dtype}
    if hasattr(config, "sample_size") and hasattr(config, "cross_attention_dim"):
        states = torch.randn(batch, tokens or 77, config.cross_attention_dim, **place)
        sample = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, **place)
        inputs = {
            "sample": sample,
            "timestep": torch.full((batch,), 500, device=place["device"]),
            "encoder_hidden_states": states,
        }
        if config.addition_embed_type == "text_time":
            # SDXL's: the sizes and the crop as six numbers, and the pooled prompt in what is left of the input.
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            sizes = torch.full((batch, 6), float(config.sample_size), **place)
            inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled, **place), "time_ids": sizes}
        return inputs
    if hasattr(config, "image_size") and hasattr(config, "num_channels"):
        side = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        return {"pixel_values": torch.randn(batch, config.num_channels, *side, **place)}
    if hasattr(config, "vocab_size"):
        length = min(tokens or 128, getattr(config, "max_position_embeddings", 128) - 2)
        return {"input_ids": torch.randint(config.vocab_size, (batch, length), device=place["device"])}
    raise ConfigError(f"what a {type(model).__name__} is given is not known here: expected a ViT, a BERT-like model or a UNet")


def throughput_rows(
    model: nn.Module,
    target_modules: str | list[str],
    methods: Mapping[str, MethodSettings],
    inputs: Inputs,
    *,
    steps: int = 3,
    rounds: int = 5,
    autocast: torch.dtype | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Times training steps (forward, backward, AdamW) of a copy of the model under each method.

    The methods take turns, a few steps each, so that what slows the machine down for a while slows all of them; ratios are those
    of the same round.

    Args:
        model: a dense transformers or diffusers model where it is to be timed; left as it is. Every method holds a copy.
        target_modules: the layers that are trained, as `match_targets` takes them; full fine-tuning trains every parameter.
        methods: title -> settings.
        inputs: keyword arguments of the model, examples first.
        steps: timed together in a round.
        rounds: how many; one more goes ahead, untimed.
        autocast: compute in this dtype under autocast; None: as the weights are.
        report: told of every method when it is ready.

    Returns:
        A row for every method: "seconds" of a step, "steps_per_second" and "examples_per_second" (all: median of the rounds),
        and "to_full" and "to_lora", the speed over that of full fine-tuning and of the last LoRA (median, with the lowest and
        highest round); None where there is no such method.

    Raises:
        ConfigError: no steps or rounds, or a method that cannot be applied.
    """
    if steps < 1 or rounds < 1:
        raise ConfigError(f"steps is {steps} and rounds is {rounds}, expected at least 1 each")
    timers = {}
    for title, settings in methods.items():
        own = copy.deepcopy(model).train()
        method = make_method(settings, {LONE_COMPONENT: None if settings.method == "full" else target_modules})
        report(f"{title}: {method.prepare(LONE_COMPONENT, own)}")
        if autocast is not None:
            method.cast_frozen(own, autocast)  # as the trainers do
        timers[title] = Timer("step()", globals={"step": _step(own, inputs, autocast)}, num_threads=torch.get_num_threads())
    seconds: dict[str, list[float]] = {title: [] for title in methods}
    for turn in range(rounds + 1):
        for title, timer in timers.items():
            taken = timer.timeit(steps).median
            if turn:
                seconds[title].append(taken)
    references = {
        name: next((title for title in reversed(methods) if methods[title].method == name), None) for name in REFERENCES
    }
    batch = len(next(iter(inputs.values())))
    return [_row(title, own, seconds, references, batch) for title, own in seconds.items()]


def _step(model: nn.Module, inputs: Inputs, autocast: torch.dtype | None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-5)
    device = next(model.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            output = model(**inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        optimizer.step()

    return step


def _row(
    title: str, own: list[float], seconds: Mapping[str, list[float]], references: Mapping[str, str | None], batch: int
) -> dict:
    middle = statistics.median(own)
    row = {"method": title, "seconds": middle, "steps_per_second": 1 / middle, "examples_per_second": batch / middle}
    for name, reference in references.items():
        ratios = None if reference is None else [b / a for a, b in zip(own, seconds[reference], strict=True)]
        row[f"to_{name}"] = None if ratios is None else statistics.median(ratios)
        row[f"to_{name}_lowest"] = None if ratios is None else min(ratios)
        row[f"to_{name}_highest"] = None if ratios is None else max(ratios)
    return row


def draw_throughput(rows: Sequence[Mapping], title: str) -> "Figure":
    """Bars: examples per second, and the speed over that of full fine-tuning and of LoRA with the spread of the rounds."""
    figure = new_figure(13, 1.4 + 0.4 * len(rows), title)
    speed, ratio = figure.subplots(1, 2, sharey=True)
    names, places = [row["method"] for row in rows], range(len(rows))
    speed.barh(names, [row["examples_per_second"] for row in rows], color="C0")
    speed.set(xlabel="examples per second (training)")
    speed.invert_yaxis()
    for number, (name, label) in enumerate((("to_full", "over full fine-tuning"), ("to_lora", "over LoRA"))):
        if rows[0][name] is None:
            continue
        middle = [row[name] for row in rows]
        spread = [[row[name] - row[f"{name}_lowest"] for row in rows], [row[f"{name}_highest"] - row[name] for row in rows]]
        heights = [place + 0.4 * number - 0.2 for place in places]
        ratio.barh(heights, middle, height=0.38, xerr=spread, color=f"C{number + 1}", label=label, error_kw={"elinewidth": 1})
    ratio.axvline(1, color="gray", linestyle=":")
    ratio.set(xlabel="ratio of speeds (line: lowest and highest round)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
