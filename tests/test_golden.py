"""Numbers computed by hand (golden/one_sgd_step.json says how): k, r, the output, and the weight after one step."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import cersa_diffusion as cersa

from .conftest import DEVICE

GOLDEN = json.loads((Path(__file__).parent / "golden" / "one_sgd_step.json").read_text())


def tensor(numbers: list) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['alpha']}-{case['beta']}")
def test_ranks_output_and_one_sgd_step(case):
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    model[0].weight.data = tensor(GOLDEN["weight"])
    config = cersa.CersaConfig(alpha=case["alpha"], beta=case["beta"], rank_multiple=1)
    row = cersa.inject_cersa(model, config, show_progress=False).layers[0]
    assert (row.kept_rank, row.core_rank) == (case["k"], case["r"])
    optimizer = torch.optim.SGD(cersa.trainable_parameters(model), lr=GOLDEN["learning_rate"])
    y = model(tensor(GOLDEN["x"]))
    torch.testing.assert_close(y, tensor(case["y"]), atol=1e-5, rtol=1e-5)
    (y * tensor(GOLDEN["g"])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight_change().float(), tensor(case["change"]), atol=1e-6, rtol=1e-5)
