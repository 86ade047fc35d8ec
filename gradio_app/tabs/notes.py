"""A line of text beside a button, which shows that its event is running, and later the reason if the event has failed.

Without it, Gradio would cover all outputs of a failed event with a label "Error", which stays there and hides them.
"""

import json
from collections.abc import Callable, Sequence

import gradio as gr
from gradio.components import Component

from gradio_app.messages import Messages

QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def new_note(elem_id: str) -> gr.HTML:
    """An empty line for messages at the current position of the page.

    Args:
        elem_id: id of the element in the page.
    """
    return gr.HTML("", elem_id=elem_id, elem_classes="note", padding=False)


def say(trigger: Callable, note: Component, text: str) -> None:
    """Shows a text at once, without a request to the server.

    Args:
        trigger: an event listener such as `button.click`.
        note: the component that shows the text.
        text: plain text.
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
    """Wires and returns an event whose messages appear in a note.

    Args:
        trigger: an event listener such as `button.click`.
        function: returns a sequence of values for `outputs`.
        inputs: inputs of the function.
        outputs: outputs of the function; they do not change when it raises.
        messages: turns errors into texts.
        note: shows `doing` while the function runs; afterwards it shows the error, or nothing.
        doing: plain text.
        options: options of the event.
    """
    say(trigger, note, doing)
    event = trigger(messages.noted(function, len(outputs)), inputs, [*outputs, note], **QUIET, **options)
    # The event was refused before it ran; Gradio shows the reason in a corner of the page.
    event.failure(None, None, note, js="() => ''", **QUIET)
    return event
