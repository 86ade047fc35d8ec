"""How many drawings may wait: a bound of their own, so that they keep nobody from anything else."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from cersa_diffusion.errors import ConfigError
from gradio_app.settings import Limits

# The queue of all events that draw.
DRAWING = "drawing"


class DrawingPlaces:
    """Counts the drawings of each visitor in Gradio's own queue, which has one bound for all events together.

    Args:
        page: whose queue it is.
        limits: `drawings_per_visitor` and `drawings`.
    """

    def __init__(self, page: gr.Blocks, limits: Limits):
        self._page, self._limits = page, limits
        # Visitor -> requests that were let in and are not in the queue yet.
        self._entering: Counter[str] = Counter()

    @contextmanager
    def entering(self, path: str, body: dict) -> Iterator[None]:
        """A context in which a request enters the queue; anything but a drawing passes.

        Args:
            path: of the request.
            body: of the request.

        Raises:
            ConfigError: there is no place.
        """
        if not self._draws(path, body):
            yield
            return
        visitor = str(body.get("session_hash"))
        places = Counter(self._visitors()) + self._entering
        if places[visitor] >= self._limits.drawings_per_visitor:
            raise ConfigError(f"{places[visitor]} drawings of yours run or wait: wait for one of them, or stop it")
        if places.total() >= self._limits.drawings:
            raise ConfigError(f"{places.total()} drawings of all visitors run or wait: try again later")
        self._entering[visitor] += 1
        try:
            yield
        finally:
            self._entering[visitor] -= 1
            self._entering += Counter()  # forgets those at zero

    def _draws(self, path: str, body: dict) -> bool:
        drawing = {number: event.api_name for number, event in self._page.fns.items() if event.concurrency_id == DRAWING}
        if path.rstrip("/").endswith("/queue/join"):
            # As a text, because Gradio takes "5" for 5.
            return str(body.get("fn_index")).strip().removesuffix(".0") in map(str, drawing)
        return path.rstrip("/").rpartition("/")[2] in drawing.values()

    def _visitors(self) -> Iterator[str]:
        """The visitor of each drawing that runs or waits."""
        queue = self._page._queue
        running = [event for job in queue.active_jobs if job for event in job if event.concurrency_id == DRAWING]
        waiting = queue.event_queue_per_concurrency_id[DRAWING].queue if DRAWING in queue.event_queue_per_concurrency_id else []
        return (event.session_hash for event in (*running, *waiting))
