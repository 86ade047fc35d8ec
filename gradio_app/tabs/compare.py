"""The Compare tab: pictures of the untouched base and of any runs side by side, with the same prompts and seeds."""

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from cersa_diffusion.errors import ConfigError
from gradio_app import uploads
from gradio_app.comparing import SCHEDULERS, STRONGEST, SWEEP, UNTOUCHED, Comparison, draw, draw_sweep, parse_seeds
from gradio_app.drawing_places import DRAWING
from gradio_app.library import Run
from gradio_app.messages import warn
from gradio_app.state import App
from gradio_app.tabs.notes import QUIET, new_note, on, say
from gradio_app.view import comparison_table, grid_picture, headings_of, size_text

# Number of columns that are chosen when the page opens: the base and, after `make demo`, its three methods.
CHOSEN = 4
EXAMPLE_PROMPT = "a 3d emoji of a sks robot on a blue background"
# The address of the page contains the settings of the last comparison, so that a visitor can share it.
TO_ADDRESS = """(text) => {
    const address = new URL(window.location);
    address.searchParams.set("settings", text);
    if (address.href.length < 8000) history.replaceState(null, "", address);
}"""

WAITING = "waiting for its turn"
NO_LONGER_WAITING = f"(text) => text === {json.dumps(WAITING)} ? '' : text"
A_MOMENT = "async () => { await new Promise((resolve) => setTimeout(resolve, 700)); return []; }"
STOPPED = f"(text) => text === {json.dumps(WAITING)} || / of /.test(text) ? 'stopped' : text"


@dataclass(frozen=True)
class Fields:
    """The inputs of a comparison, in the order of the arguments of `read_form`."""

    base: gr.Dropdown
    columns: gr.CheckboxGroup
    prompts: gr.Textbox
    negative: gr.Textbox
    seeds: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    scheduler: gr.Dropdown
    token: gr.Textbox
    strengths: list[gr.Slider]

    def list(self) -> list:
        """All inputs as one flat list."""
        single_fields = [value for value in vars(self).values() if value is not self.strengths]
        return [*single_fields, *self.strengths]


class CompareTab:
    """Builds the tab inside the current Blocks.

    Args:
        app: the parts behind the page.
    """

    def __init__(self, app: App):
        self.app, self.limits = app, app.settings.limits
        # Name -> run, for the adapters that this visitor has uploaded.
        self.uploaded = gr.State({}, delete_callback=_remove_adapters)
        # Names of the runs whose strengths the sliders show, in the order of the sliders.
        self.slider_names = gr.State([])
        self.known_runs = gr.State(())
        self.fields = self._build_fields()
        self._build_outputs()
        self._wire()

    def columns(self, base: str, uploaded: dict[str, Run]) -> list[str]:
        """The possible columns of a comparison on a base."""
        runs_of_base = [name for name, run in self.app.library.runs().items() if run.base_name == base]
        return [UNTOUCHED, *runs_of_base, *uploaded]

    def _build_fields(self) -> Fields:
        bases = list(self.app.library.bases())
        first = bases[0] if bases else None
        choices = self.columns(first, {}) if first else [UNTOUCHED]
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompts = gr.Textbox(
                    EXAMPLE_PROMPT, label="Prompts", info="one per line", lines=2, max_lines=8, elem_id="prompts"
                )
                negative = gr.Textbox("", label="Negative prompt", info="what guidance leads away from")
                with gr.Row():
                    seeds = gr.Textbox("0, 1", label="Seeds", info="0, 1 or 0-3; the same for every column", min_width=120)
                    token = gr.Textbox("sks", label="Subject word", info="left out for CLIPScore", min_width=120)
            with gr.Column(scale=2, min_width=280):
                base = gr.Dropdown(bases, value=first, label="Base", elem_id="base")
                columns = gr.CheckboxGroup(
                    choices, value=choices[:CHOSEN], label="Columns", info=f"up to {self.limits.columns}", elem_id="columns"
                )
                upload = gr.File(
                    label="Add a CERSA adapter (.safetensors)", file_types=[".safetensors"], height=150, elem_id="adapter-upload"
                )
                self.upload_note = new_note("adapter-note")
            with gr.Column(scale=1, min_width=220):
                steps = gr.Slider(1, 100, 25, step=1, label="Steps")
                guidance = gr.Slider(0, 30, 4, step=0.5, label="Guidance")
                scheduler = gr.Dropdown(list(SCHEDULERS), value=next(iter(SCHEDULERS)), label="Scheduler")
        self.upload = upload
        with gr.Accordion("Strengths", open=False), gr.Row():
            strengths = [
                gr.Slider(0, STRONGEST, 1, step=0.05, label=f"Strength {number}", visible=False, min_width=200)
                for number in range(1, self.limits.columns + 1)
            ]
        return Fields(base, columns, prompts, negative, seeds, steps, guidance, scheduler, token, strengths)

    def _build_outputs(self) -> None:
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", elem_id="draw")
            self.stop = gr.Button("Stop", elem_id="stop-drawing")
        self.status = gr.Markdown("", elem_id="compare-status", elem_classes="status")
        with gr.Accordion("Strength sweep", open=False):
            # This app checks the value against the current folders; Gradio would check it against an earlier list.
            self.sweep_run = gr.Dropdown(
                [], label="Adapter", info="drawn at strength 0 to 1.5, with the first prompt and seed", allow_custom_value=True
            )
            self.sweep = gr.Button("Draw the sweep", elem_id="sweep")
        self.table = gr.HTML(elem_id="compare-table")
        self.download = gr.DownloadButton("Download the pictures as one", interactive=False, elem_id="grid")
        with gr.Accordion("Share these settings", open=False):
            self.json = gr.Textbox(
                label="Settings as JSON",
                lines=3,
                max_lines=6,
                elem_id="settings",
                info="also in the address of the page",
                buttons=["copy"],
            )
            self.load = gr.Button("Use these settings", elem_id="use-settings")
            self.load_note = new_note("settings-note")

    def _wire(self) -> None:
        fields = self.fields
        self._wire_drawing()
        gr.on(
            [fields.columns.change, fields.base.change],
            self.update_strengths,
            [self.uploaded, fields.columns, self.slider_names, *fields.strengths],
            [self.sweep_run, self.slider_names, *fields.strengths],
            show_progress="hidden",
            api_visibility="private",
        )
        fields.base.input(
            self.update_columns, [fields.base, self.uploaded], fields.columns, show_progress="hidden", api_visibility="private"
        )
        messages = self.app.messages
        added = on(
            self.upload.upload, self.add_adapter, [self.upload, self.uploaded, fields.base, fields.columns],
            [self.uploaded, fields.columns], messages=messages, note=self.upload_note, doing="loading the adapter",
        )  # fmt: skip
        # The field is emptied for the next upload, whether this one succeeds or fails.
        added.then(None, None, self.upload, js="() => null", **QUIET)
        on(
            self.load.click, self.use_settings, [self.json, self.uploaded], self.shared(),
            messages=messages, note=self.load_note, doing="",
        )  # fmt: skip

    def _wire_drawing(self) -> None:
        inputs = [self.uploaded, *self.fields.list()]
        outputs = [self.status, self.table, self.download, self.json]
        # All drawings share one place in the queue of the server and run in the order of their arrival.
        options = {"concurrency_id": DRAWING, "concurrency_limit": 1, "show_progress": "hidden"}
        streamed = self.app.messages.streamed
        events = []
        for button, function, name, extra in (
            (self.go, self.run, "compare", []),
            (self.sweep, self.run_sweep, "sweep", [self.sweep_run]),
        ):
            say(button.click, self.status, WAITING)
            event = button.click(streamed(function, len(outputs) - 1), [*extra, *inputs], outputs, api_name=name, **options)
            event.then(None, self.json, None, js=TO_ADDRESS)
            event.failure(None, self.status, self.status, js=NO_LONGER_WAITING, **QUIET)
            events.append(event)
        stopped = self.stop.click(None, cancels=events).then(None, self.status, self.status, js=STOPPED, **QUIET)
        # Once more a moment later: an output of the drawing that was on its way may have replaced the word.
        stopped.then(None, None, None, js=A_MOMENT, **QUIET).then(None, self.status, self.status, js=STOPPED, **QUIET)

    def read_form(self, uploaded: dict[str, Run], *values) -> tuple[Comparison, list[Run | None]]:
        """The checked comparison of the form, and the runs of its columns.

        Args:
            uploaded: the adapters of this visitor.
            values: values of `Fields.list`.

        Raises:
            ConfigError: a value cannot be used.
        """
        base, columns, prompts, negative, seeds, steps, guidance, scheduler, token, *strengths = values
        runs = self._runs(base, columns or [], uploaded)
        sliders = [run.name for run in runs if run is not None and run.has_strength]
        comparison = Comparison(
            base=base,
            columns=tuple(columns or []),
            prompts=tuple(line.strip() for line in prompts.splitlines() if line.strip()),
            seeds=parse_seeds(seeds, self.limits.seeds),
            strengths={name: float(value) for name, value in zip(sliders, strengths, strict=False)},
            negative_prompt=negative.strip(),
            steps=int(steps),
            guidance=float(guidance),
            scheduler=scheduler,
            token=token.strip() or "sks",
        )
        comparison.check(self.limits)
        return comparison, runs

    def _runs(self, base: str, columns: list[str], uploaded: dict[str, Run]) -> list[Run | None]:
        known = {name: run for name, run in self.app.library.runs().items() if run.base_name == base} | uploaded
        unknown = [name for name in columns if name != UNTOUCHED and name not in known]
        if unknown:
            raise ConfigError(f"no run named {', '.join(map(repr, unknown))} for this base: choose other columns")
        return [None if name == UNTOUCHED else known[name] for name in columns]

    def run(self, uploaded: dict[str, Run], *values) -> Iterator[tuple]:
        """Draws a comparison; the table grows with every picture."""
        comparison, runs = self.read_form(uploaded, *values)
        base = self.app.library.base(comparison.base)
        stream = draw(comparison, base, runs, self.app.store, self.app.scorer)
        notes = ["" if run is None else f"{size_text(run.file_bytes)} file" for run in runs]
        yield from self._stream(comparison, comparison.rows(), headings_of(comparison, runs), notes, stream)

    def run_sweep(self, name: str | None, uploaded: dict[str, Run], *values) -> Iterator[tuple]:
        """Draws the first prompt and seed with one adapter at strengths from 0 to 1.5."""
        if not name or name == UNTOUCHED:
            raise ConfigError("no adapter is chosen for the sweep: choose a column with an adapter first")
        comparison, _ = self.read_form(uploaded, *values)
        [run] = self._runs(comparison.base, [name], uploaded)
        base = self.app.library.base(comparison.base)
        stream = draw_sweep(comparison, base, run, self.app.store, self.app.scorer)
        headings = [(f"strength {strength:g}", name) for strength in SWEEP]
        yield from self._stream(comparison, comparison.rows()[:1], headings, [""] * len(SWEEP), stream)

    def _stream(self, comparison: Comparison, rows, headings, notes, stream) -> Iterator[tuple]:
        finished: dict = {}
        total, settings = len(rows) * len(headings), comparison.to_json()
        no_file = gr.update(value=None, interactive=False)
        yield f"0 of {total} pictures", comparison_table(rows, headings, finished, notes), no_file, settings
        for drawn in stream:
            finished[drawn.row, drawn.column] = drawn
            text = f"{len(finished)} of {total} pictures"
            yield text, comparison_table(rows, headings, finished, notes), gr.skip(), gr.skip()
        path = self.app.place("pictures.png")
        grid_picture(rows, headings, finished).save(path)
        yield f"{total} picture{'s' * (total != 1)}, done", gr.skip(), gr.update(value=str(path), interactive=True), gr.skip()

    def shared(self) -> list:
        """The components that shared settings fill: the fields, and the names of the strengths of the sliders."""
        return [*self.fields.list(), self.slider_names]

    def update_strengths(self, uploaded: dict[str, Run], columns: list[str], before: list[str], *values: float) -> list:
        """One slider for every chosen column that has a strength, and the choices of the sweep."""
        names = self._with_strength(columns or [], uploaded)
        strengths = dict(zip(before, values, strict=False))
        return [gr.update(choices=names, value=names[0] if names else None), names, *self._sliders(names, strengths)]

    def _with_strength(self, columns: list[str], uploaded: dict[str, Run]) -> list[str]:
        runs = self.app.library.runs() | uploaded
        return [name for name in columns if name in runs and runs[name].has_strength]

    def _sliders(self, names: list[str], values: dict[str, float]) -> list:
        used = [gr.update(visible=True, label=f"Strength of {name}", value=values.get(name, 1.0)) for name in names]
        return [*used, *(gr.update(visible=False, value=1.0) for _ in self.fields.strengths[len(names) :])]

    def update_columns(self, base: str, uploaded: dict[str, Run]):
        """The columns for another base."""
        choices = self.columns(base, uploaded)
        return gr.update(choices=choices, value=choices[:CHOSEN])

    def refresh_columns(self, known: tuple[str, ...], base: str, columns: list[str], uploaded: dict[str, Run]) -> tuple:
        """The columns to choose from, if there are new runs or removed runs since the last update."""
        runs = tuple(self.app.library.runs())
        if runs == tuple(known):
            return gr.skip(), gr.skip()
        choices = self.columns(base, uploaded)
        return runs, gr.update(choices=choices, value=[name for name in columns or [] if name in choices])

    def add_adapter(self, path: str | None, uploaded: dict[str, Run], base: str, columns: list[str]) -> tuple:
        """Adds an uploaded adapter to the columns, if it can be loaded on the base."""
        if path is None:
            return gr.skip(), gr.skip()
        try:
            adapter = uploads.read_upload(path, self.limits)
            uploads.check_share(path, [run.weights_path for run in uploaded.values()], self.limits)
        except Exception:
            self.app.folder.remove([path])
            raise
        name = self._free_name(f"upload: {uploads.shown_name(Path(path).stem)}", uploaded)
        prompt = str(adapter.training.get("instance_prompt", ""))
        run = Run(name, "cersa", uploads.keep(path, self.app.folder.adapters), None, prompt)
        try:
            with self.app.store.lease(self.app.library.base(base), run):
                pass  # only loading shows whether the base and the layers fit
        except Exception:
            run.weights_path.unlink()
            raise
        uploaded = uploaded | {name: run}
        chosen = [*(columns or []), name][: self.limits.columns]
        return uploaded, gr.update(choices=self.columns(base, uploaded), value=chosen)

    def _free_name(self, name: str, uploaded: dict[str, Run]) -> str:
        taken = {*uploaded, *self.app.library.runs(), UNTOUCHED}
        candidates = (name, *(f"{name} ({number})" for number in range(2, 100)))
        return next(candidate for candidate in candidates if candidate not in taken)

    def use_settings(self, text: str, uploaded: dict[str, Run]) -> list:
        """The fields filled with shared settings; columns that do not exist here are left out with a warning."""
        values, missing = self._values_of(text, uploaded)
        if missing:
            warn([_left_out(missing)])
        return values

    def _values_of(self, text: str, uploaded: dict[str, Run]) -> tuple[list, list[str]]:
        """Values of `shared`, and the names of the columns that do not exist here."""
        comparison = Comparison.from_json(text)
        base = self.app.library.base(comparison.base).name
        choices = self.columns(base, uploaded)
        chosen = [name for name in comparison.columns if name in choices]
        comparison.check(self.limits)
        names = self._with_strength(chosen, uploaded)
        values = [
            base, gr.update(choices=choices, value=chosen), "\n".join(comparison.prompts), comparison.negative_prompt,
            ", ".join(map(str, comparison.seeds)), comparison.steps, comparison.guidance, comparison.scheduler,
            comparison.token, *self._sliders(names, comparison.strengths), names,
        ]  # fmt: skip
        return values, [name for name in comparison.columns if name not in choices]

    def from_address(self, uploaded: dict[str, Run], request: gr.Request) -> list:
        """The fields with the settings in the address of the page, or else with the current columns; and a status."""
        text, status = request.query_params.get("settings"), ""
        if text:
            try:
                values, missing = self._values_of(text, uploaded)
                return [*values, html.escape(_left_out(missing)) if missing else ""]
            except ValueError as error:
                status = html.escape(f"the settings in the address are not used: {self.app.messages.text(error)}")
        values = [gr.skip() for _ in self.shared()]
        bases = list(self.app.library.bases())
        choices = self.columns(bases[0], uploaded) if bases else [UNTOUCHED]
        values[0] = gr.update(choices=bases, value=bases[0] if bases else None)
        values[1] = gr.update(choices=choices, value=choices[:CHOSEN])
        return [*values, status]


def _left_out(names: list[str]) -> str:
    return f"left out, because they do not exist here: {', '.join(names)}"


def _remove_adapters(uploaded: dict[str, Run]) -> None:
    """Removes the adapters of a visitor who has left."""
    for run in uploaded.values():
        run.weights_path.unlink(missing_ok=True)
