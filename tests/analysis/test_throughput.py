"""Speed of training: what is compared, not how fast it is."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from cersa_diffusion import ConfigError
from cersa_diffusion.analysis.kinds import targets_by_component
from cersa_diffusion.analysis.models import open_model
from cersa_diffusion.analysis.throughput import default_methods, draw_throughput, random_inputs, throughput_rows

from ..conftest import raises


@pytest.mark.parametrize("name", ["bert", "vit", "deberta-v3"])
def test_all_methods_train_the_same_layers_in_turns(name, model_path):
    components = open_model(model_path(name)).components
    model = components["model"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    targets = targets_by_component(components, None, "QKV")["model"]
    said: list[str] = []
    rows = throughput_rows(
        model, targets, default_methods((0.9,), (2, 4)), random_inputs(model, 3), steps=1, rounds=3, report=said.append
    )
    assert [row["method"] for row in rows] == ["full", "LoRA r=2", "LoRA r=4", "CERSA alpha=0.9"]
    assert said[0].startswith("full: all parameters") and all("6 layers" in line for line in said[1:])
    for row in rows:
        assert row["examples_per_second"] == pytest.approx(3 / row["seconds"])
        assert row["to_lora_lowest"] <= row["to_lora"] <= row["to_lora_highest"]
    assert rows[0]["to_full"] == rows[2]["to_lora"] == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    bars = draw_throughput(rows, "").axes[0].patches
    assert [bar.get_width() for bar in bars] == [row["examples_per_second"] for row in rows]


def small_unet(**changes) -> UNet2DConditionModel:
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**sizes, **blocks, norm_num_groups=4, attention_head_dim=4, **changes)


def test_a_unet_under_autocast():
    unet = small_unet()
    rows = throughput_rows(
        unet, ["to_q"], default_methods((0.9,), ()), random_inputs(unet, 2), steps=1, rounds=1, autocast=torch.bfloat16
    )
    assert rows[1]["to_full"] > 0 and rows[1]["to_lora"] is None


def test_a_unet_of_sdxl_is_given_its_sizes():
    widths = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 4 * 6 + 10}
    unet = small_unet(addition_embed_type="text_time", **widths)
    inputs = random_inputs(unet, 2)
    assert inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 10)
    assert throughput_rows(unet, ["to_q"], default_methods((0.9,), (2,)), inputs, steps=1, rounds=1)[2]["to_lora"] > 0


def test_bad_input_is_refused(network, model_path):
    with raises(ConfigError, "Sequential"):
        random_inputs(network, 1)
    with raises(ConfigError, "batch", "0"):
        random_inputs(network, 0)
    with raises(ConfigError, "rounds", "0"):
        throughput_rows(network, "all-linear", {}, {"x": torch.zeros(1)}, rounds=0)
