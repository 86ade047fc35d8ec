"""The limit of waiting drawings, separate from the limit of the queue, so that drawings do not block other events."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from cersa_diffusion.errors import ConfigError
from gradio_app.settings import Limits

# Name of the queue of all drawings.
DRAWING = "drawing"


class DrawingPlaces:
    """Counts the drawings of each visitor in the queue of Gradio, which has only one limit for all events together.

    Args:
        page: the page with the queue.
        limits: its `drawings_per_visitor` and `drawings` are used.
    """

    def __init__(self, page: gr.Blocks, limits: Limits):
        self._page, self._limits = page, limits
        # Visitor -> number of accepted requests that are not in the queue yet.
        self._entering: Counter[str] = Counter()

    @contextmanager
    def entering(self, path: str, body: dict) -> Iterator[None]:
        """A context in which a request enters the queue; requests that do not draw are always accepted.

        Args:
            path: path of the request.
            body: body of the request.

        Raises:
            ConfigError: too many drawings run or wait.
        """
        if not self._draws(path, body):
            yield
            return
        visitor = str(body.get("session_hash"))
        drawings = Counter(self._visitors()) + self._entering
        if drawings[visitor] >= self._limits.drawings_per_visitor:
            raise ConfigError(f"{drawings[visitor]} of your drawings run or wait: wait for one of them, or stop it")
        if drawings.total() >= self._limits.drawings:
            raise ConfigError(f"{drawings.total()} drawings of all visitors run or wait: try again later")
        self._entering[visitor] += 1
        try:
            yield
        finally:
            self._entering[visitor] -= 1
            self._entering += Counter()  # removes visitors with zero requests

    def _draws(self, path: str, body: dict) -> bool:
        drawing = {number: event.api_name for number, event in self._page.fns.items() if event.concurrency_id == DRAWING}
        if path.rstrip("/").endswith("/queue/join"):
            # Compared as text, because Gradio accepts "5" as 5.
            return str(body.get("fn_index")).strip().removesuffix(".0") in map(str, drawing)
        return path.rstrip("/").rpartition("/")[2] in drawing.values()

    def _visitors(self) -> Iterator[str]:
        """The visitor of each running or waiting drawing."""
        queue = self._page._queue
        running = [event for job in queue.active_jobs if job for event in job if event.concurrency_id == DRAWING]
        waiting = queue.event_queue_per_concurrency_id[DRAWING].queue if DRAWING in queue.event_queue_per_concurrency_id else []
        return (event.session_hash for event in (*running, *waiting))
