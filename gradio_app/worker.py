"""A training in its own process.

It does not run in a thread for two reasons. Loading a pipeline temporarily changes how modules are created in the whole process,
so the column of a visitor would change the models of the training. A training that runs out of memory would also end the page.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple

from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, TrainingStopped, train_dreambooth
from gradio_app.messages import Messages

# If the system supports it: a server that has imported everything once, and forks for each training.
_CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")


class Ending(NamedTuple):
    """The end of a training: "finished", "stopped" or "failed", and a message for the page."""

    state: str
    message: str


class _Reporter(TrainingCallback):
    """Sends events of the training to the process of the page: the kind of the event, and its data."""

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
    """Runs a training and waits until it has finished, stopped or failed.

    Args:
        config: its settings.
        messages: turns errors into texts.
        stop: flag of `new_stop`; it ends the training with a checkpoint.
        on_event: called with "start" (first step, description), "step" (`StepProgress`) and "preview" (step, pictures).
    """
    if _CONTEXT.get_start_method() == "forkserver":
        _CONTEXT.set_forkserver_preload(["gradio_app.worker"])
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_train, args=(config, messages, sender, stop), name="training", daemon=True)
    process.start()
    # Only the child process keeps the sending end, so the pipe is closed when the child dies.
    sender.close()
    ending = None
    while True:
        try:
            kind, data = receiver.recv()
        except EOFError:
            break
        if kind == "end":
            ending = data
        else:
            on_event(kind, data)
    process.join()
    return ending or Ending("failed", f"its process died (exit code {process.exitcode}); the usual reason is too little memory")


def _train(config: DreamBoothConfig, messages: Messages, pipe: Connection, stop: Event) -> None:
    try:
        train_dreambooth(config, [_Reporter(pipe, stop)])
        ending = Ending("finished", "it is now a column in Compare")
    except (TrainingStopped, KeyboardInterrupt):
        ending = Ending("stopped", "stopped; it can be resumed")
    except Exception as error:
        ending = Ending("failed", messages.text(error))
    pipe.send(("end", ending))
