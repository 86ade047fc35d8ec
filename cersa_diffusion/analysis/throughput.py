"""Training speed of several methods on the same layers, measured in one run, and its ratios (CERSA, Fig. 9)."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from cersa_diffusion.analysis.output import Figure, new_figure
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.model import LONE_COMPONENT, trainable_parameters
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.methods.table import make_method

REFERENCES = ("full", "lora")
Inputs = Mapping[str, Tensor | dict[str, Tensor]]


def default_methods(alphas: Sequence[float], lora_ranks: Sequence[int]) -> dict[str, MethodSettings]:
    """The methods that Fig. 9 compares: full fine-tuning, LoRA at several ranks, CERSA at several alphas."""
    methods = {"full": MethodSettings(method="full")}
    methods |= {f"LoRA r={rank}": MethodSettings(method="lora", rank=rank) for rank in lora_ranks}
    return methods | {f"CERSA alpha={alpha:g}": MethodSettings(alpha=alpha) for alpha in alphas}


def random_inputs(model: nn.Module, batch: int, tokens: int | None = None) -> dict[str, Tensor | dict[str, Tensor]]:
    """Random inputs for one training step, on the device of the model.

    Args:
        model: a ViT-like, BERT-like or UNet model of transformers or diffusers.
        batch: number of examples.
        tokens: length of the sentences (default 128), or of the prompts of a UNet (default 77). Pictures have the size that
            the configuration of the model gives.

    Raises:
        ConfigError: `batch` is below 1, or the inputs of the model are not known here.
    """
    if batch < 1:
        raise ConfigError(f"batch is {batch}, expected at least 1")
    config = getattr(model, "config", None)
    parameter = next(model.parameters())
    like = {"device": parameter.device, "dtype": parameter.dtype}
    if hasattr(config, "sample_size") and hasattr(config, "cross_attention_dim"):
        states = torch.randn(batch, tokens or 77, config.cross_attention_dim, **like)
        sample = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, **like)
        timestep = torch.full((batch,), 500, device=parameter.device)
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states}
        if config.addition_embed_type == "text_time":
            # SDXL: sizes and crop are six embedded numbers; the pooled prompt fills the rest of the input.
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            sizes = torch.full((batch, 6), float(config.sample_size), **like)
            inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled, **like), "time_ids": sizes}
        return inputs
    if hasattr(config, "image_size") and hasattr(config, "num_channels"):
        sides = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        return {"pixel_values": torch.randn(batch, config.num_channels, *sides, **like)}
    if hasattr(config, "vocab_size"):
        length = min(tokens or 128, getattr(config, "max_position_embeddings", 128) - 2)
        return {"input_ids": torch.randint(config.vocab_size, (batch, length), device=parameter.device)}
    raise ConfigError(f"the inputs of a {type(model).__name__} are not known here: expected a ViT, a BERT-like model or a UNet")


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

    The methods take turns, a few steps each, so that a temporary slowdown of the machine affects all of them; the ratios compare
    times of the same round.

    Args:
        model: a dense transformers or diffusers model on the device to time; it is not changed. Every method holds a copy.
        target_modules: the trained layers, as `match_targets` takes them; full fine-tuning trains every parameter.
        methods: title -> settings.
        inputs: keyword arguments of the model; the first dimension counts the examples.
        steps: steps that are timed together in a round.
        rounds: number of timed rounds; one untimed round precedes them.
        autocast: dtype of autocast; None: compute in the dtype of the weights.
        report: called with one line when a method is ready.

    Returns:
        A row for every method: "seconds" of a step, "steps_per_second" and "examples_per_second" (medians of the rounds), and
        "to_full" and "to_lora", the speed divided by that of full fine-tuning and of the last LoRA (median, with the lowest and
        highest round; None if there is no such method).

    Raises:
        ConfigError: `steps` or `rounds` is below 1, or a method cannot be applied.
    """
    if steps < 1 or rounds < 1:
        raise ConfigError(f"steps is {steps} and rounds is {rounds}, expected at least 1 each")
    timers = {}
    for title, settings in methods.items():
        copied = copy.deepcopy(model).train()
        method = make_method(settings, {LONE_COMPONENT: None if settings.method == "full" else target_modules})
        report(f"{title}: {method.prepare(LONE_COMPONENT, copied)}")
        if autocast is not None:
            method.cast_frozen(copied, autocast)  # as the trainers do
        timers[title] = Timer("step()", globals={"step": _step(copied, inputs, autocast)}, num_threads=torch.get_num_threads())
    seconds: dict[str, list[float]] = {title: [] for title in methods}
    for turn in range(rounds + 1):
        for title, timer in timers.items():
            measured = timer.timeit(steps).median
            if turn:
                seconds[title].append(measured)
    # The last of several LoRAs is the reference.
    last = {settings.method: title for title, settings in methods.items()}
    references = {name: seconds[last[name]] if name in last else None for name in REFERENCES}
    batch = len(next(iter(inputs.values())))
    return [_row(title, times, references, batch) for title, times in seconds.items()]


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


def _row(title: str, times: list[float], references: Mapping[str, list[float] | None], batch: int) -> dict:
    median = statistics.median(times)
    row = {"method": title, "seconds": median, "steps_per_second": 1 / median, "examples_per_second": batch / median}
    for name, reference in references.items():
        ratios = None if reference is None else [theirs / time for time, theirs in zip(times, reference, strict=True)]
        for ending, statistic in (("", statistics.median), ("_lowest", min), ("_highest", max)):
            row[f"to_{name}{ending}"] = None if ratios is None else statistic(ratios)
    return row


def draw_throughput(rows: Sequence[Mapping], title: str) -> Figure:
    """Bars of the examples per second, and of the speed relative to full fine-tuning and LoRA with the spread of the rounds."""
    figure, (speed, ratio) = new_figure(13, 1.4 + 0.4 * len(rows), title, columns=2, sharey=True)
    speed.barh([row["method"] for row in rows], [row["examples_per_second"] for row in rows], color="C0")
    speed.set(xlabel="examples per second (training)")
    speed.invert_yaxis()
    for number, (name, label) in enumerate((("to_full", "relative to full fine-tuning"), ("to_lora", "relative to LoRA"))):
        if rows[0][name] is None:
            continue
        medians = [row[name] for row in rows]
        spread = [[row[name] - row[f"{name}_lowest"] for row in rows], [row[f"{name}_highest"] - row[name] for row in rows]]
        positions = [position + 0.4 * number - 0.2 for position in range(len(rows))]
        ratio.barh(positions, medians, height=0.38, xerr=spread, color=f"C{number + 1}", label=label, error_kw={"elinewidth": 1})
    ratio.axvline(1, color="gray", linestyle=":")
    ratio.set(xlabel="ratio of speeds (line: from the lowest to the highest round)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
