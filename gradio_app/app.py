#!/usr/bin/env python
"""A page to compare, train and inspect CERSA adapters in a browser."""

import argparse
import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Python puts the folder of the script on its path, but the package is in the folder above.
sys.path[0] = str(REPOSITORY)

AUTH_VARIABLE = "CERSA_APP_AUTH"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models-dir",
        type=Path,
        action="append",
        help="folder of pipelines to offer as bases; may be repeated (default: assets)",
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        action="append",
        help="folder of trained runs; may be repeated; new runs go into the first folder (default: outputs/app and outputs/demo)",
    )
    parser.add_argument(
        "--base", action="append", default=[], help="another base: path or hub id of a diffusers checkpoint; may be repeated"
    )
    parser.add_argument(
        "--clip",
        default=str(REPOSITORY / "assets" / "emoji-clip"),
        help="folder or hub id of the CLIP that scores (default: the embedded CLIP); 'none': no scores",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which browsers open the page, such as the name of a reverse proxy; may be repeated",
    )
    parser.add_argument(
        "--auth",
        action="append",
        default=[],
        metavar="USER:PASSWORD",
        help="require this login; may be repeated; all users of this machine can read it in the list of processes",
    )
    parser.add_argument(
        "--auth-file",
        type=Path,
        help=f"file with a line USER:PASSWORD for each user; the environment variable {AUTH_VARIABLE} may hold such lines, too",
    )
    parser.add_argument("--device", help="where pictures are drawn (default: cuda if there is one)")
    # The names of DRAWING_DTYPES, without the import of torch that they need.
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="dtype of pipelines that draw, without their autoencoder; auto: 16 bits on a GPU, float32 on a CPU",
    )
    parser.add_argument("--max-pipelines", type=int, default=4, help="most pipelines held in memory (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        arguments.auth = read_users(arguments.auth, arguments.auth_file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return arguments


def read_users(pairs: list[str], file: Path | None) -> list[tuple[str, str]]:
    """Users and passwords from the command line, a file and the environment.

    Args:
        pairs: texts of the form USER:PASSWORD.
        file: a file with such lines.

    Returns:
        (user, password) pairs.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not of the form USER:PASSWORD, or the file has no lines.
    """
    sources = {"--auth": pairs, AUTH_VARIABLE: os.environ.get(AUTH_VARIABLE, "").splitlines()}
    if file is not None:
        sources[f"--auth-file {file}"] = file.read_text().splitlines()
    users = []
    for source, lines in sources.items():
        for number, line in enumerate(lines, start=1):
            user, _, password = line.strip().partition(":")
            if not user or not password:
                raise ValueError(f"{source}, line {number}: expected USER:PASSWORD, and neither may be empty")
            users.append((user, password))
    if file is not None and not users:
        raise ValueError(f"--auth-file {file}: expected lines USER:PASSWORD, found none")
    return users


def main() -> None:
    """Starts the page and waits until it ends."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    work_dir = Path(tempfile.mkdtemp(prefix="cersa-app-"))
    atexit.register(shutil.rmtree, work_dir, ignore_errors=True)
    # Set before Gradio is imported, so that it keeps uploads in a folder of this process only.
    os.environ["GRADIO_TEMP_DIR"] = str(work_dir / "gradio")

    import torch

    from cersa_diffusion.pipelines.draw import DRAWING_DTYPES
    from gradio_app.hosts import LOCAL
    from gradio_app.page import build_page, serve
    from gradio_app.settings import AppSettings
    from gradio_app.state import App

    app = App.of(
        AppSettings(
            models_dirs=tuple(path.resolve() for path in arguments.models_dir or [REPOSITORY / "assets"]),
            runs_dirs=tuple(path.resolve() for path in arguments.runs_dir or [Path("outputs/app"), Path("outputs/demo")]),
            work_dir=work_dir,
            bases=tuple(arguments.base),
            clip=None if arguments.clip == "none" else arguments.clip,
            max_pipelines=arguments.max_pipelines,
            device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=DRAWING_DTYPES[arguments.dtype],
        )
    )
    if arguments.host not in LOCAL and not arguments.auth:
        logging.warning("everybody who can reach %s can use this page: add --auth-file", arguments.host)
    print(f"open http://{arguments.host}:{arguments.port} (Ctrl-C to end)", flush=True)
    # SIGTERM acts like Ctrl-C, so that a running training writes a checkpoint first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    page = build_page(app)
    serve(
        page, app, host=arguments.host, port=arguments.port, auth=arguments.auth, allowed_hosts=arguments.allow_host
    )  # fmt: skip
    app.jobs.close()


if __name__ == "__main__":
    main()
