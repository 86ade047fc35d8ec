"""The card beside a result, and an upload that fails before the training if it can."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi, ModelCard

from cersa_diffusion import ConfigError
from cersa_diffusion.training import DreamBoothConfig, load_result, train_dreambooth
from cersa_diffusion.training.publish.upload import Publication
from cersa_diffusion.training.settings.file import read_settings

from ..conftest import raises


def test_the_card_says_how_to_use_the_result(small_settings, tmp_path, monkeypatch):
    settings = small_settings | {"validation_prompt": "a sks cat on the moon", "num_validation_images": 2}
    settings |= {"output_dir": "cat", "validation_inference_steps": 2}
    monkeypatch.chdir(tmp_path)
    result = train_dreambooth(DreamBoothConfig(**settings), [])
    card = ModelCard.load(Path(result.output_dir) / "README.md")
    assert card.data.instance_prompt == "a sks cat" and "cersa" in card.data.tags
    assert (Path(result.output_dir) / card.data.widget[0]["output"]["url"]).is_file()
    (code,) = card.text.split("```python")[1:]
    assert 'load_cersa_weights("./pytorch_cersa_weights.safetensors")' in code and 'pipe("a sks cat"' in code


def test_a_base_of_variant_files_only(small_base, small_settings, tmp_path):
    base = StableDiffusionPipeline.from_pretrained(small_base("sd1"), dtype=torch.float16)
    base.save_pretrained(tmp_path / "half", variant="fp16")
    settings = small_settings | {"pretrained_model_name_or_path": str(tmp_path / "half"), "variant": "fp16", "max_train_steps": 1}
    settings |= {"validation_prompt": "a sks cat", "num_validation_images": 1, "validation_inference_steps": 2}
    config = DreamBoothConfig(**settings)
    result = train_dreambooth(config, [])
    assert (Path(result.output_dir) / "validation" / "00.png").is_file()
    assert 'half", variant="fp16")' in result.snippet(config)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as making a repository takes."""

    def do_POST(self):
        self.server.requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        known = self.headers.get("Authorization") == "Bearer good"
        body = json.dumps({"url": f"{self.server.address}/someone/run"} if known else {"error": "no"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.address = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "cersa_diffusion.training.publish.upload.HfApi", lambda token: HfApi(endpoint=server.address, token=token)
    )
    yield server
    server.shutdown()


def test_an_upload_that_is_not_allowed_is_refused_before_the_training(small_settings, hub):
    with raises(ConfigError, "push_to_hub", "run"):
        train_dreambooth(DreamBoothConfig(**small_settings, push_to_hub=True, hub_token="bad"), [])
    assert not Path(small_settings["output_dir"]).exists()


def test_the_repository_is_made_under_the_name_of_the_folder(small_settings, hub):
    publication = Publication.begin(DreamBoothConfig(**small_settings, push_to_hub=True, hub_token="good"))
    assert publication.repository == "someone/run"
    assert hub.requests[0][0] == "/api/repos/create" and hub.requests[0][1]["name"] == "run"


class Uploads:
    """The hub's side of an upload: writes what it is sent into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create_commit(self, repo_id, operations, commit_message):
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())


WEIGHTS = {"cersa": "pytorch_cersa_weights.safetensors", "lora": "pytorch_lora_weights.safetensors", "full": "pipeline"}


@pytest.mark.parametrize("method", WEIGHTS)
def test_what_goes_out(method, small_settings, tmp_path, tmp_path_factory):
    """The result and its description, no pictures to learn from, and no folder of this machine; at home all is as it was."""
    run, sent = tmp_path / "run", tmp_path / "sent"
    shutil.copytree(small_settings["instance_data_dir"], run / "pictures")
    shutil.copytree(small_settings["instance_data_dir"], run / "class_pictures")
    shutil.copy(next((run / "pictures").glob("*.png")), run / "private.png")
    settings = small_settings | {"instance_data_dir": str(run / "pictures"), "class_data_dir": str(run / "class_pictures")}
    settings |= {"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 5, "method": method, "rank": 2}
    settings |= {"validation_prompt": "a sks cat", "num_validation_images": 1, "validation_inference_steps": 2}
    settings |= {"max_train_steps": 1, "checkpointing_steps": 1, "hub_token": "secret token"}
    config = DreamBoothConfig(**settings)
    result = train_dreambooth(config, [])
    written = (run / "config.toml").read_text()
    if method != "full":
        # What is passed on by hand tells no more.
        assert str(tmp_path_factory.getbasetemp()).encode() not in (run / WEIGHTS[method]).read_bytes()
    Publication(Uploads(sent), "someone/run", config).upload(result)

    top = {path.name for path in sent.iterdir()}
    assert top == {"README.md", "pictures.png", "config.toml", "result.json", WEIGHTS[method]}
    for path in sent.rglob("*.*"):
        content = path.read_bytes()
        for private in (str(tmp_path_factory.getbasetemp()), str(Path.home()), "secret token"):
            assert private.encode() not in content, f"{path.name} names {private}"
    shown = json.loads((sent / "result.json").read_text())
    opened = load_result(method, sent / shown["weights_path"], small_settings["pretrained_model_name_or_path"])
    assert isinstance(opened, StableDiffusionPipeline)
    DreamBoothConfig(**read_settings(sent / "config.toml"))
    assert ModelCard.load(sent / "README.md").data.base_model is None
    assert (run / "config.toml").read_text() == written
    assert read_settings(run / "config.toml")["instance_data_dir"] == settings["instance_data_dir"]


def test_a_base_of_the_hub_keeps_its_name(small_settings, tmp_path):
    result = train_dreambooth(DreamBoothConfig(**small_settings | {"max_train_steps": 1}), [])
    config = DreamBoothConfig(**small_settings | {"pretrained_model_name_or_path": "someone/base"})
    Publication(Uploads(tmp_path / "sent"), "someone/run", config).upload(result)
    assert read_settings(tmp_path / "sent" / "config.toml")["pretrained_model_name_or_path"] == "someone/base"
    assert not (tmp_path / "sent" / "pictures.png").exists()
