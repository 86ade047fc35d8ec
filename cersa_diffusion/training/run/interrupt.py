"""Ctrl-C and SIGTERM end a run at the next step boundary, where a checkpoint can be written."""

import signal
import threading


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is noted instead of raised; a second one is raised at once.

    Outside the main thread, where Python delivers no signals, it notes nothing: such a run is stopped by a callback.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
