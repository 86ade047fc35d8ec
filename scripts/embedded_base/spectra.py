"""How many singular values the linear layers of the base need: what a subspace method can save on it."""

import torch
from torch import nn

from cersa_diffusion.functional import energy_rank

ENERGIES = (0.8, 0.9, 0.95)


def layer_kind(name: str) -> str:
    """The kind of a linear layer of the denoiser or the text encoder, from its name.

    Args:
        name: Dotted name of the module.
    """
    if "attn1" in name or "self_attn" in name:
        return "self-attention"
    if "attn2" in name:
        return "cross-attention"
    if ".ff." in name or ".mlp." in name:
        return "feed-forward"
    return "time embedding"


def kept_shares(weight: torch.Tensor) -> list[float]:
    """Share of the singular values that hold each of `ENERGIES` of the sum of squares.

    Args:
        weight: A matrix.
    """
    values = torch.linalg.svdvals(weight.double())
    return [energy_rank(values, energy) / len(values) for energy in ENERGIES]


def spectrum_table(models: dict[str, nn.Module]) -> str:
    """Mean kept shares by kind of layer, as a Markdown table, with random matrices of the same shapes beside.

    Args:
        models: Models by the name they have in the table.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [
        "| model | kind of linear layer | layers | k/n at .8 | at .9 | at .95 | random, at .95 |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, model in models.items():
        kinds: dict[str, list[torch.Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                kinds.setdefault(layer_kind(name), []).append(module.weight.detach())
        for kind, weights in kinds.items():
            learned = torch.tensor([kept_shares(weight) for weight in weights]).mean(0).tolist()
            noise = [kept_shares(torch.randn(weight.shape, generator=generator))[-1] for weight in weights]
            figures = [*learned, sum(noise) / len(noise)]
            cells = " | ".join(f"{figure:.2f}" for figure in figures)
            rows.append(f"| {title} | {kind} | {len(weights)} | {cells} |")
    return "\n".join(rows)
