"""The Inspect tab: the ranks of a base, their memory, and the description of an adapter file."""

from pathlib import Path

import gradio as gr

from cersa_diffusion.adapters.report import describe_adapter
from gradio_app import uploads
from gradio_app.inspection import draw_memory, draw_ranks, draw_spectra, memory_by_alpha, plan_of, surveyed
from gradio_app.state import App
from gradio_app.tabs.notes import QUIET, new_note, on


class InspectTab:
    """Builds the tab inside the current Blocks.

    Args:
        app: the parts behind the page.
    """

    def __init__(self, app: App):
        self.app = app
        bases = list(app.library.bases())
        figure = {"type": "filepath", "interactive": False, "show_label": False, "buttons": ["fullscreen", "download"]}
        with gr.Row():
            self.base = gr.Dropdown(bases, value=bases[0] if bases else None, label="Base", min_width=200)
            self.alpha = gr.Slider(0.5, 1, 0.95, step=0.01, label="alpha", min_width=200)
            self.rank = gr.Slider(1, 256, 32, step=1, label="Rank of LoRA", min_width=200)
            self.kind = gr.Dropdown([], label="Layers whose spectra are drawn", min_width=200)
        self.look = gr.Button("Look into the base", variant="primary", elem_id="inspect")
        self.note = new_note("inspect-note")
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("#### Training memory against alpha")
                self.memory = gr.Image(label="Training memory against alpha", **figure)
            with gr.Column(min_width=300):
                gr.Markdown("#### Spectra")
                self.spectra = gr.Image(label="Spectra of the chosen layers", **figure)
        gr.Markdown("#### Ranks by layer, and compression")
        self.ranks = gr.Image(label="Ranks by layer, and compression", **figure)
        self.plan = gr.Textbox(label="Memory plan", lines=12, max_lines=24, elem_id="inspect-plan", elem_classes="report")
        with gr.Accordion("An adapter file", open=True), gr.Row():
            with gr.Column(min_width=260):
                self.upload = gr.File(
                    label="CERSA adapter (.safetensors)", file_types=[".safetensors"], height=120, elem_id="info-upload"
                )
                self.info_note = new_note("info-note")
            self.info = gr.Textbox(
                label="What it says", lines=10, max_lines=24, elem_id="info", elem_classes="report", min_width=300
            )
        self._wire()

    def _wire(self) -> None:
        messages = self.app.messages
        drawn = [self.memory, self.spectra, self.ranks, self.plan, self.kind]
        queue = {"concurrency_id": "inspect", "concurrency_limit": 1}
        inputs = [self.base, self.alpha, self.rank, self.kind]
        for trigger in (self.look.click, self.kind.input):
            on(
                trigger, self.inspect, inputs, drawn,
                messages=messages, note=self.note, doing="looking into the base", **queue,
            )  # fmt: skip
        described = on(
            self.upload.upload, self.describe, self.upload, [self.info],
            messages=messages, note=self.info_note, doing="reading the file",
        )  # fmt: skip
        # The file is not kept, whether the event succeeds or fails.
        described.then(None, None, self.upload, js="() => null", **QUIET)

    def inspect(self, name: str, alpha: float, rank: float, kind: str | None) -> list:
        """The figures and the plan of a base."""
        base = self.app.library.base(name)
        with self.app.store.lease(base) as pipeline:
            plan = plan_of(pipeline, float(alpha), int(rank))
            layers = surveyed(pipeline)
        layers_of_kind = plan.by_kind()
        kind = kind if kind in layers_of_kind else max(layers_of_kind, key=lambda name: len(layers_of_kind[name]))
        files = [self.app.place(f"{figure}.png") for figure in ("memory", "spectra", "ranks")]
        draw_memory(plan, memory_by_alpha(layers), float(alpha), files[0])
        draw_spectra(plan, kind, float(alpha), files[1])
        draw_ranks(plan, files[2])
        return [*map(str, files), str(plan), gr.update(choices=list(layers_of_kind), value=kind)]

    def describe(self, path: str | None) -> list[str]:
        """The text of `cersa info` for an uploaded adapter; removes the upload."""
        if path is None:
            return [""]
        try:
            text = describe_adapter(uploads.read_upload(path, self.app.settings.limits))
        finally:
            self.app.folder.remove([path])
        return [f"{uploads.shown_name(Path(path).name)}\n{self.app.messages.clean(text)}"]
