"""The page to compare, train and inspect in a browser. `python gradio_app/app.py` starts it; docs/app.md describes it."""
