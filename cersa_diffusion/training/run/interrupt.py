"""Ctrl-C and SIGTERM end a run after the current step, when a checkpoint can be written."""

import signal
import threading


class StopRequest:
    """A context that records the first SIGINT or SIGTERM; the second one raises `KeyboardInterrupt` at once.

    Python delivers signals to the main thread only. In another thread the context records none: there a callback stops the run.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in self.signals}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
