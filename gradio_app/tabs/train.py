"""The Train tab: a form with its memory plan, the queue of trainings that all visitors share, and the results."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import gradio as gr
import pandas as pd

from cersa_diffusion import export_lora
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.methods.table import METHODS
from cersa_diffusion.pipelines.open import load_base
from gradio_app import uploads
from gradio_app.jobs import ENDED, Job, new_name
from gradio_app.state import App
from gradio_app.tabs.notes import QUIET, new_note, on
from gradio_app.training import LEARNING_RATES, PRESET_CHOICES, RANKED, TrainForm
from gradio_app.view import previews_strip, size_text

# Seconds between two updates from the queue.
INTERVAL = 1.5
# Largest number of points of the curve in the page.
CURVE_POINTS = 250
# The fields of the form that only CERSA reads.
CERSA_FIELDS = ("alpha", "beta", "memory_budget", "rank_multiple", "uniform_blocks")
LORA_FORMATS = {"diffusers": "diffusers", "kohya (ComfyUI, A1111, Forge)": "kohya"}


@dataclass(frozen=True)
class MadeLora:
    """A LoRA that was made from a result.

    Args:
        chosen: name of the result, rank, and name of the keys in the page.
        path: path of the file.
        report: report of the export.
    """

    chosen: tuple[str, int, str]
    path: Path
    report: str


class TrainTab:
    """Builds the tab inside the current Blocks.

    Args:
        app: the parts behind the page.
    """

    def __init__(self, app: App):
        self.app, self.limits = app, app.settings.limits
        self.form = self._build_form()
        self._build_jobs()
        self._build_results()
        # The state that this visitor has seen last.
        self.seen = gr.State(None)
        self.timer = gr.Timer(INTERVAL)
        self._wire()

    @property
    def inputs(self) -> list[gr.components.Component]:
        """The fields of the form, in the order of `TrainForm`."""
        return list(self.form.values())

    def _build_form(self) -> dict[str, gr.components.Component]:
        """The fields of `TrainForm` by name."""
        bases, default = list(self.app.library.bases()), TrainForm(base="")
        limits = self.limits
        with gr.Row():
            with gr.Column(min_width=280):
                self.pictures = gr.File(
                    label=f"{limits.fewest_pictures} to {limits.most_pictures} pictures of the subject",
                    file_count="multiple", file_types=uploads.SUFFIXES, height=150, elem_id="pictures-upload",
                )  # fmt: skip
                form = {
                    "instance_prompt": gr.Textbox(
                        default.instance_prompt, label="Prompt of the subject", info="with a rare word that will stand for it"
                    ),
                    "class_prompt": gr.Textbox(
                        "",
                        label="Prompt of its class (optional)",
                        info="keeps the class from becoming the subject; takes twice as long",
                    ),
                    "preview_prompt": gr.Textbox(
                        "", label="Prompt of the previews (optional)", info="default: that of the subject"
                    ),
                }
            with gr.Column(min_width=280):
                form["base"] = gr.Dropdown(bases, value=bases[0] if bases else None, label="Base")
                with gr.Row():
                    form["method"] = gr.Dropdown(list(METHODS), value=default.method, label="Method", min_width=120)
                    form["preset"] = gr.Dropdown(PRESET_CHOICES, value=default.preset, label="Preset", min_width=120)
                form["alpha"] = gr.Slider(
                    0.5, 1, default.alpha, step=0.01, label="alpha", info="share of energy that is kept (CERSA)"
                )
                form["beta"] = gr.Slider(
                    0.1, 1, default.beta, step=0.01, label="beta", info="share that is trained, at most alpha"
                )
                form["memory_budget"] = gr.Textbox(
                    "", label="Memory budget (optional)", info="such as 100MB; decides instead of alpha", placeholder="100MB"
                )
                with gr.Row():
                    form["rank_multiple"] = gr.Number(
                        default.rank_multiple, label="Ranks in multiples of", info="1: exact ranks",
                        precision=0, minimum=1, min_width=120,
                    )  # fmt: skip
                    form["uniform_blocks"] = gr.Checkbox(
                        default.uniform_blocks, label="Uniform blocks", info="for torch.compile", min_width=120
                    )
                form["rank"] = gr.Slider(1, 256, default.rank, step=1, label="Rank", info="LoRA, PiSSA, DoRA", visible=False)
            with gr.Column(min_width=280):
                with gr.Row():
                    form["steps"] = gr.Number(default.steps, label="Training steps", precision=0, minimum=1, min_width=100)
                    form["batch_size"] = gr.Number(
                        default.batch_size, label="Pictures per step", precision=0, minimum=1, min_width=100
                    )
                with gr.Row():
                    form["learning_rate"] = gr.Number(default.learning_rate, label="Learning rate", minimum=0, min_width=100)
                    form["seed"] = gr.Number(default.seed, label="Seed", precision=0, minimum=0, min_width=100)
                self.plan = gr.Textbox(label="Memory plan", lines=9, max_lines=14, elem_id="plan", elem_classes="report")
                self.start = gr.Button("Start training", variant="primary", elem_id="start-training")
                self.start_note = new_note("start-note")
        return {field.name: form[field.name] for field in fields(TrainForm)}

    def _build_jobs(self) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.job = gr.Dropdown([], label="Training", elem_id="job")
                with gr.Row():
                    self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-training")
                    self.resume = gr.Button("Resume", interactive=False, elem_id="resume-training")
                self.job_note = new_note("job-note")
                self.list = gr.HTML(elem_id="jobs")
            with gr.Column(scale=2, min_width=280):
                self.progress = gr.HTML(elem_id="job-progress")
                self.curve = gr.LinePlot(
                    x="step", y="loss", height=230, x_title="step", y_title="loss", label="Loss", visible=False
                )
                self.previews = gr.HTML(elem_id="previews")
        with gr.Accordion("What the trainer says", open=False):
            self.description = gr.Textbox(show_label=False, label="Description", lines=8, elem_classes="report")

    def _build_results(self) -> None:
        gr.Markdown("### Take a result away")
        runs = list(self.app.library.runs())
        with gr.Row():
            with gr.Column(min_width=280):
                self.result = gr.Dropdown(runs, value=None, label="Result", elem_id="result")
                self.file = gr.DownloadButton("Download the file", interactive=False, elem_id="result-file", size="md")
            with gr.Column(min_width=280):
                with gr.Row():
                    self.rank = gr.Slider(1, 256, 64, step=1, label="Rank of the LoRA", min_width=160)
                    self.keys = gr.Dropdown(list(LORA_FORMATS), value="diffusers", label="Keys of the LoRA", min_width=160)
                with gr.Row():
                    self.export = gr.Button("Make a LoRA of it", interactive=False, elem_id="export-lora", size="md")
                    self.lora = gr.DownloadButton("Download the LoRA", interactive=False, elem_id="lora-file", size="md")
                self.lora_note = new_note("lora-note")
        # The last LoRA that this visitor has made.
        self.made = gr.State(None)
        self.export_report = gr.Textbox(label="About the LoRA", lines=4, visible=False, elem_classes="report")

    def _wire(self) -> None:
        inputs, quiet = self.inputs, QUIET
        planned = ("base", "preset", "batch_size", "class_prompt", "method", *CERSA_FIELDS, "rank")
        gr.on(
            [self.form[name].change for name in planned], self.show_plan, inputs, self.plan,
            trigger_mode="always_last", concurrency_id="plan", concurrency_limit=1, **quiet,
        )  # fmt: skip
        self.form["method"].input(
            self.show_method, self.form["method"],
            [self.form[name] for name in (*CERSA_FIELDS, "rank", "learning_rate")], **quiet,
        )  # fmt: skip
        messages = self.app.messages
        on(
            self.start.click, self.submit, [self.pictures, *inputs], [self.job, self.pictures], messages=messages,
            note=self.start_note, doing="checking pictures and settings", concurrency_id="submit", concurrency_limit=1,
        )  # fmt: skip
        # Outside the queue, so that a training can be cancelled even if the queue is full.
        for button, function in ((self.cancel, self.app_cancel), (self.resume, self.app_resume)):
            on(button.click, function, self.job, [], messages=messages, note=self.job_note, doing="", queue=False)
        watched = [self.job, self.seen]
        self.watching = [
            self.job, self.list, self.progress, self.curve, self.previews, self.description, self.cancel, self.resume,
            self.result, self.seen,
        ]  # fmt: skip
        # Outside the queue, so that a busy server still shows the progress of the training.
        self.timer.tick(self.watch, watched, self.watching, queue=False, **quiet)
        self.job.change(self.watch, watched, self.watching, queue=False, **quiet)
        self.result.change(self.choose_result, self.result, [self.file, self.export], **quiet)
        self._wire_export()

    def _wire_export(self) -> None:
        chosen, offered = [self.result, self.rank, self.keys], [self.lora, self.export_report]
        quiet = {**QUIET, "queue": False}
        gr.on([field.change for field in chosen], self.offer_lora, [self.made, *chosen], offered, **quiet)
        # An earlier file must not be confused with the file that is being made.
        cleared = self.export.click(self.forget_lora, None, [self.made, *offered], **quiet)
        made = on(
            cleared.then, self.make_lora, chosen, [self.made], messages=self.app.messages,
            note=self.lora_note, doing="making the LoRA", concurrency_id="export", concurrency_limit=1,
        )  # fmt: skip
        made.then(self.offer_lora, [self.made, *chosen], offered, **quiet)

    def show_plan(self, *values) -> str:
        """The memory plan for the form, or the message of its error."""
        try:
            form = self._read(values)
            base = self.app.library.base(form.base)
            with self.app.store.lease(base) as pipeline:
                return form.plan(pipeline, base.source, self.limits)
        except Exception as error:
            return self.app.messages.text(error)

    def show_method(self, method: str) -> list:
        """Shows the fields that a method reads, and its usual learning rate."""
        cersa, ranked = method == "cersa", method in RANKED
        return [*(gr.update(visible=cersa) for _ in CERSA_FIELDS), gr.update(visible=ranked), LEARNING_RATES.get(method, 5e-4)]

    def _read(self, values: Sequence) -> TrainForm:
        form = dict(zip(self.form, values, strict=True))
        missing = [name for name, value in form.items() if value is None]
        if missing:
            raise ConfigError(f"{', '.join(missing).replace('_', ' ')}: no value is given")
        numbers = {name: int(form[name]) for name in ("rank_multiple", "rank", "steps", "batch_size", "seed")}
        return TrainForm(**form | numbers)

    def submit(self, pictures: list[str] | None, *values) -> tuple:
        """Adds a training to the queue; writes nothing if a setting or a picture cannot be used."""
        form = self._read(values)
        base = self.app.library.base(form.base)
        self.app.jobs.check_room()
        taken = [*self.app.library.runs(), *(job.name for job, _ in self.app.jobs.jobs())]
        name = new_name(form.method, taken)
        folder = self.app.settings.runs_dirs[0] / name
        with self.app.store.lease(base) as pipeline:
            config = form.config(pipeline, base.source, folder, self.limits)
        uploads.save_pictures(pictures or [], folder / "pictures", self.limits)
        self.app.jobs.submit(name, config)
        self.app.folder.remove(pictures)
        gr.Info(f"{name} is in the queue")
        return gr.update(choices=self._job_choices(), value=name), None

    def app_cancel(self, name: str) -> list:
        """Cancels the chosen training."""
        self.app.jobs.cancel(name)
        return []

    def app_resume(self, name: str) -> list:
        """Resumes the chosen training."""
        self.app.jobs.resume(name)
        return []

    def _job_choices(self) -> list[str]:
        return [job.name for job, _ in reversed(self.app.jobs.jobs())]

    def watch(self, chosen: str | None, seen: tuple | None) -> list:
        """Updates of everything that has changed since the last update of this visitor."""
        version, runs = self.app.jobs.version, list(self.app.library.runs())
        jobs = self.app.jobs.jobs()
        names = [job.name for job, _ in jobs]
        if chosen not in names:
            chosen = _default_job(jobs)
        # States and steps are included, because another process may train a run that has ended here without a new version.
        current = (version, chosen, tuple(runs), *((job.state, job.step) for job, _ in jobs))
        if seen is not None and tuple(seen) == current:
            return [gr.skip()] * len(self.watching)
        results = gr.update(choices=runs) if seen is None or tuple(seen[2]) != current[2] else gr.skip()
        if chosen is None:
            return [gr.skip()] * (len(self.watching) - 2) + [results, current]
        job, place = jobs[names.index(chosen)]
        curve = _curve(job)
        return [
            gr.update(choices=names[::-1], value=chosen),
            job_table(jobs, chosen),
            job_progress(job, place, self.app.messages.clean(job.message)),
            gr.update(value=curve, visible=len(curve) > 0),
            previews_strip(job.previews),
            self.app.messages.clean(job.description),
            gr.update(interactive=job.state not in ENDED and not job.cancelled),
            gr.update(interactive=job.resumable),
            results,
            current,
        ]

    def choose_result(self, name: str | None) -> list:
        """Offers the file of a result; a whole pipeline is a folder and cannot be downloaded."""
        run = self.app.library.runs().get(name) if name else None
        file = gr.update(value=None, interactive=False)
        if run is not None and run.weights_path.is_file():
            file = gr.update(
                value=self._copy(run.weights_path, run.name), interactive=True, label=f"Download the {run.method} file"
            )
        exportable = run is not None and issubclass(METHODS[run.method], CersaMethod)
        return [file, gr.update(interactive=exportable)]

    def _copy(self, path: Path, name: str) -> str:
        # A copy, because Gradio serves only files of its own folder and has no access to the folders of the runs.
        copy = self.app.place(f"{name.replace('/', '-')}{path.suffix}")
        copy.write_bytes(path.read_bytes())
        return str(copy)

    def forget_lora(self) -> list:
        """Removes the offer of the last LoRA."""
        return [None, gr.update(value=None, interactive=False), gr.update(visible=False)]

    def make_lora(self, name: str | None, rank: float, keys: str) -> list:
        """Writes a CERSA result as a LoRA."""
        run = self.app.library.runs().get(name) if name else None
        if run is None or not issubclass(METHODS[run.method], CersaMethod) or keys not in LORA_FORMATS:
            raise ConfigError("choose a CERSA result: only CERSA results can be exported as a LoRA")
        layout = LORA_FORMATS[keys]
        path = self.app.place(f"{run.name.replace('/', '-')}-lora-r{int(rank)}-{layout}.safetensors")
        # The export loads its own base, because the pipelines in memory are shared and must not change.
        source = self.app.library.base(run.base_name).source
        with self.app.store.loading:
            base = load_base(source, revision=run.revision, variant=run.variant)
            report = export_lora(run.weights_path, path, rank=int(rank), format=layout, base=base, prompt=run.prompt)
        text = str(report).replace(str(path), path.name)
        return [MadeLora((name, int(rank), keys), path, text)]

    def offer_lora(self, made: MadeLora | None, name: str | None, rank: float | None, keys: str | None) -> list:
        """Offers the last LoRA if it belongs to the current choice of result, rank and keys."""
        if made is None or made.chosen != (name, rank, keys) or not made.path.exists():
            return self.forget_lora()[1:]
        return [gr.update(value=str(made.path), interactive=True), gr.update(value=made.report, visible=True)]


def _default_job(jobs: list[tuple[Job, int | None]]) -> str | None:
    """The job that a new visitor sees: the running job, or else the newest job."""
    running = [job.name for job, _ in jobs if job.state == "running"]
    return running[0] if running else jobs[-1][0].name if jobs else None


def _state_text(job: Job, place: int | None) -> str:
    if job.state == "queued":
        return f"waiting, place {place}"
    if job.state == "running":
        return "stopping" if job.cancelled else "running" if job.step else "preparing"
    if job.state == "elsewhere":
        return "training elsewhere"
    return job.state


def job_table(jobs: list[tuple[Job, int | None]], chosen: str) -> str:
    """All trainings, the newest first.

    Args:
        jobs: the jobs with their places in the queue.
        chosen: name of the job whose details are shown.
    """
    rows = ""
    for job, place in reversed(jobs):
        css_class = ' class="chosen"' if job.name == chosen else ""
        rows += (
            f"<tr{css_class}><td>{html.escape(job.name)}</td><td>{html.escape(_state_text(job, place))}</td>"
            f"<td>{job.step} / {job.config.max_train_steps}</td></tr>"
        )
    return (
        '<table class="jobs"><caption class="sr-only">Trainings</caption><thead><tr><th scope="col">training</th>'
        f'<th scope="col">state</th><th scope="col">steps</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def job_progress(job: Job, place: int | None, message: str) -> str:
    """A progress bar and a line about one training.

    Args:
        job: the training.
        place: its place in the queue.
        message: why it ended.
    """
    total = job.config.max_train_steps
    texts = [f"{job.name}: {_state_text(job, place)}", f"step {job.step} of {total}"]
    if job.losses:
        texts += [f"loss {job.losses[-1][1]:.4f}", f"{job.speed:.1f} pictures/s", f"peak {size_text(job.peak_memory)}"]
    texts += [message] if message else []
    line = html.escape(" · ".join(texts))
    return f'<div role="status"><progress max="{total}" value="{job.step}" aria-label="progress"></progress><p>{line}</p></div>'


def _curve(job: Job) -> pd.DataFrame:
    """The loss of every step, or of groups of steps their mean loss, so that there are at most `CURVE_POINTS` points."""
    frame = pd.DataFrame(job.losses, columns=["step", "loss"])
    group_size = -(-len(frame) // CURVE_POINTS) or 1
    return frame.groupby(frame.index // group_size).agg({"step": "last", "loss": "mean"})
