"""A training in a process of its own.

Not in a thread: loading a pipeline changes how modules are made in the whole process for a moment, so that a visitor's column
would end up in the training's models, and a training that runs out of memory would take the page with it.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple

from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, TrainingStopped, train_dreambooth
from gradio_app.messages import Messages

# A server that has imported everything once, and forks for each training, where the system can.
_CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")


class Ending(NamedTuple):
    """How a training ended: "finished", "stopped" or "failed", and a line for the page."""

    state: str
    message: str


class _Reporter(TrainingCallback):
    """Sends what happens to the page's process: the name of what happened, and the facts."""

    def __init__(self, pipe: Connection, stop: Event):
        self.pipe, self.stop = pipe, stop

    def on_start(self, start):
        self.pipe.send(("start", (start.first_step, "\n".join(start.description))))

    def on_step(self, progress):
        self.pipe.send(("step", progress))

    def on_preview(self, step, pictures):
        self.pipe.send(("preview", (step, list(pictures))))

    def should_stop(self):
        return self.stop.is_set()


def new_stop() -> Event:
    """A flag that stops a training when it is set."""
    return _CONTEXT.Event()


def run_training(config: DreamBoothConfig, messages: Messages, stop: Event, on_event: Callable[[str, object], None]) -> Ending:
    """Runs a training and waits for its end, whatever that is.

    Args:
        config: its settings.
        messages: turns errors into texts.
        stop: of `new_stop`; ends the training with a checkpoint.
        on_event: is told "start" (first step, description), "step" (`StepProgress`) and "preview" (step, pictures).
    """
    if _CONTEXT.get_start_method() == "forkserver":
        _CONTEXT.set_forkserver_preload(["gradio_app.worker"])
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_train, args=(config, messages, sender, stop), name="training", daemon=True)
    process.start()
    # The other end is the child's alone: its death closes the pipe.
    sender.close()
    ending = None
    while True:
        try:
            kind, facts = receiver.recv()
        except EOFError:
            break
        if kind == "end":
            ending = facts
        else:
            on_event(kind, facts)
    process.join()
    return ending or Ending("failed", f"its process died (exit code {process.exitcode}): most often that is too little memory")


def _train(config: DreamBoothConfig, messages: Messages, pipe: Connection, stop: Event) -> None:
    try:
        train_dreambooth(config, [_Reporter(pipe, stop)])
        ending = Ending("finished", "it is a column in Compare now")
    except (TrainingStopped, KeyboardInterrupt):
        ending = Ending("stopped", "stopped; it can be resumed")
    except Exception as error:
        ending = Ending("failed", messages.text(error))
    pipe.send(("end", ending))
