"""The whole page: its tabs, its look, and its server."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from gradio_app.drawing_places import DrawingPlaces
from gradio_app.guard import Guard
from gradio_app.hosts import Hosts
from gradio_app.state import App
from gradio_app.tabs.compare import CompareTab
from gradio_app.tabs.inspect import InspectTab
from gradio_app.tabs.train import TrainTab

INTRODUCTION = """# CERSA
Personalise a text-to-image model inside the principal subspace of its layers, and see it beside LoRA and full fine-tuning."""
# No fonts or scripts from other servers: the page works without a network, and no other server learns that it was opened.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    # The default grey of hints is too light to read.
    block_info_text_color="*neutral_600",
    body_text_color_subdued="*neutral_600",
)
# Seconds between two searches for old uploads and downloads.
CACHE_SECONDS = 600


def build_page(app: App) -> gr.Blocks:
    """The page with its tabs.

    Args:
        app: the parts behind the page.
    """
    with gr.Blocks(
        title="CERSA",
        analytics_enabled=False,
        delete_cache=(CACHE_SECONDS, int(app.settings.limits.kept_seconds)),
        fill_width=True,
    ) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(app)
            with gr.Tab("Train", id="train") as train_tab:
                train = TrainTab(app)
            with gr.Tab("Inspect", id="inspect"):
                InspectTab(app)
        train_tab.select(train.show_plan, train.inputs, train.plan, show_progress="hidden", api_visibility="private")
        # A finished training becomes a column of every open page at once.
        train.timer.tick(
            compare.refresh_columns,
            [compare.known_runs, compare.fields.base, compare.fields.columns, compare.uploaded],
            [compare.known_runs, compare.fields.columns],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        # Outside the queue, so that the page opens even if the queue is full.
        page.load(
            compare.from_address,
            compare.uploaded,
            [*compare.shared(), compare.status],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def serve(
    page: gr.Blocks,
    app: App,
    *,
    host: str,
    port: int | None,
    auth: list[tuple[str, str]],
    allowed_hosts: Sequence[str] = (),
    block: bool = True,
):
    """Starts the server.

    Args:
        page: as `build_page` returns it.
        app: the parts behind the page.
        host: address to listen on.
        port: port to listen on; None: any free port.
        auth: (user, password) pairs; if empty, no login is required.
        allowed_hosts: further names under which browsers open the page, such as the name of a reverse proxy.
        block: wait until the server ends.

    Returns:
        The application, its local address and its public address, as `launch` of Gradio returns them.
    """
    limits = app.settings.limits
    guard = Middleware(
        Guard, hosts=Hosts(host, allowed_hosts), folder=app.folder, places=DrawingPlaces(page, limits), limits=limits
    )
    # The limit of drawings is below the limit of the queue, and no event can bypass the queue.
    return page.queue(default_concurrency_limit=2, max_size=3 * limits.drawings, api_open=False).launch(
        server_name=host,
        server_port=port,
        auth=auth or None,
        prevent_thread_lock=not block,
        theme=THEME,
        css=(Path(__file__).parent / "style.css").read_text(),
        # The server sends only files that the page itself has put into its cache.
        allowed_paths=[],
        blocked_paths=[str(path) for path in (*app.settings.models_dirs, *app.settings.runs_dirs)],
        max_file_size=limits.adapter_bytes,
        app_kwargs={"middleware": [guard]},
        # No calls of the hub with the token of the operator, and no public statistics about visitors.
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        quiet=True,
    )
