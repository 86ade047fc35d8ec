"""The models of a comparison draw in its dtype; trainings and autoencoders keep theirs."""

import pytest
import torch
from accelerate.state import AcceleratorState

from cersa_diffusion.study.cells import Cell
from cersa_diffusion.study.definition import read_study
from cersa_diffusion.study.worker import open_trained, open_untrained

from .conftest import STUDY


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("row", ["base", "truncated-.9", "lora-r2", "cersa-.9"])
def test_models_draw_in_the_dtype_of_the_study(study_file, tmp_path, row, name, dtype):
    AcceleratorState._reset_state(reset_partial_state=True)
    training = STUDY["training"] | {"with_prior_preservation": True, "num_class_images": 1, "max_train_steps": 1}
    study = read_study(study_file(training=training, sampling=STUDY["sampling"] | {"dtype": name}))
    subject, opened = study.read_subjects()["my-cat"], open_untrained
    cell = Cell("my-cat", row)
    if study.row(row).trained:
        cell, opened = Cell("my-cat", row, 1e-2, 0), open_trained
    pipeline = opened(study, cell, subject, tmp_path)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == dtype and pipeline.vae.dtype == torch.float32
