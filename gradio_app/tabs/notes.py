"""A line beside a button: what it is doing, and then why it could not.

Gradio's own way is a plate "Error" over everything that the event would have changed, which stays there and hides it.
"""

import json
from collections.abc import Callable, Sequence

import gradio as gr
from gradio.components import Component

from gradio_app.messages import Messages

QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def new_note(elem_id: str) -> gr.HTML:
    """An empty line for messages, where it is called.

    Args:
        elem_id: of the element in the page.
    """
    return gr.HTML("", elem_id=elem_id, elem_classes="note", padding=False)


def say(trigger: Callable, note: Component, text: str) -> None:
    """Shows a text at once, without asking the server.

    Args:
        trigger: an event listener such as `button.click`.
        note: where.
        text: plain.
    """
    trigger(None, None, note, js=f"() => {json.dumps(text)}", **QUIET)


def on(
    trigger: Callable,
    function: Callable,
    inputs: Component | Sequence[Component] | None,
    outputs: Sequence[Component],
    *,
    messages: Messages,
    note: Component,
    doing: str,
    **options,
) -> gr.events.Dependency:
    """Wires an event whose message stands in a note.

    Args:
        trigger: an event listener such as `button.click`.
        function: returns a sequence of values for `outputs`.
        inputs: of the function.
        outputs: of the function; they stay as they are when it raises.
        messages: turns errors into texts.
        note: says `doing` while the function runs, and afterwards nothing or what went wrong.
        doing: plain text.
        options: of the event.

    Returns:
        The event.
    """
    say(trigger, note, doing)
    event = trigger(messages.noted(function, len(outputs)), inputs, [*outputs, note], **QUIET, **options)
    # Refused before it ran, which Gradio tells in a corner of the page.
    event.failure(None, None, note, js="() => ''", **QUIET)
    return event
