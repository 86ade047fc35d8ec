"""Errors as messages in the page; they tell a visitor what to do and show nothing of the inside of the server."""

import functools
import html
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr

from cersa_diffusion.errors import CersaError

_log = logging.getLogger(__name__)


class Messages:
    """Turns exceptions into texts without the folders of the machine.

    Args:
        hidden: folder -> the text that replaces it in messages.
    """

    def __init__(self, hidden: dict[Path, str]):
        paths = {str(form): name for path, name in hidden.items() for form in (path, path.absolute(), path.resolve())}
        # The longest path comes first, because folders may be nested. Relative paths such as "." would match any text.
        self._hidden = sorted(
            ((path, name) for path, name in paths.items() if Path(path).is_absolute()), key=lambda pair: -len(pair[0])
        )

    def text(self, error: BaseException) -> str:
        """The message for an error; the details of an unexpected error go to the log of the server."""
        if not isinstance(error, CersaError):
            _log.error("unexpected error", exc_info=error)
            return f"Something went wrong inside the server ({type(error).__name__}); its log has the details."
        return self.clean(str(error))

    def clean(self, text: str) -> str:
        """A text without the folders of the machine."""
        for path, name in self._hidden:
            text = text.replace(path, name)
        return text

    def streamed(self, function: Callable, others: int) -> Callable:
        """A stream whose first output shows an error; the caller of an endpoint also gets the error.

        Args:
            function: a generator function of tuples.
            others: number of its other outputs; they do not change when it raises.
        """

        @functools.wraps(function)
        def stream(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                yield self.note(error), *[gr.skip()] * others
                raise self._as_message(error) from None

        return stream

    def noted(self, function: Callable, others: int) -> Callable:
        """A function with one more output: a note with the error, empty without an error.

        Args:
            function: returns a sequence of values.
            others: number of its outputs; they do not change when it raises.
        """

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return *function(*args, **kwargs), ""
            except Exception as error:
                return *[gr.skip()] * others, self.note(error)

        return call

    def note(self, error: Exception) -> str:
        """An error as HTML for the line beside a button."""
        return f'<p role="alert">{html.escape(self.text(error))}</p>'

    def _as_message(self, error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        # Gradio shows messages as HTML, and these messages quote text from visitors.
        return gr.Error(html.escape(self.text(error)), duration=15, print_exception=False)


def warn(texts: Sequence[str]) -> None:
    """Shows warnings in the page."""
    for text in texts:
        gr.Warning(html.escape(text))
