"""Licence texts and attributions that travel with everything made from the artwork."""

import shutil
from pathlib import Path

from .settings import ARTWORKS

APACHE_LICENCE = Path(__file__).parents[2] / "LICENSE"

FLUENT_LICENCE = """\
The pictures are from Fluent Emoji, https://github.com/microsoft/fluentui-emoji, under this licence:

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

NOTO_NOTICE = """\
Noto Emoji, https://github.com/googlefonts/noto-emoji
Copyright Google Inc. and the Noto Emoji authors.
Licensed under the Apache License, Version 2.0; the text is in LICENSE-APACHE-2.0.txt beside this file.
"""

TWEMOJI_NOTICE = """\
Twemoji, https://github.com/jdecked/twemoji (before: https://github.com/twitter/twemoji)
Copyright Twitter, Inc. and other contributors.
Graphics licensed under CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
Changes: rendered to 64 x 64 pixels, put on plain coloured backgrounds, and used to train the models in this folder.
"""

FIREFOX_LICENCE = """\
The pictures are from Firefox OS Emoji, https://github.com/mozilla/fxemoji
Copyright Mozilla Foundation and contributors.
Licensed under the Apache License, Version 2.0, https://www.apache.org/licenses/LICENSE-2.0
Changes: rendered to 256 x 256 pixels and put on plain coloured backgrounds.
"""

EMOJIONE_LICENCE = """\
The pictures are from Emoji One 2 (now EmojiTwo), https://github.com/EmojiTwo/emojitwo
Emoji artwork by Emoji One and the EmojiTwo contributors, licensed under CC BY 4.0,
https://creativecommons.org/licenses/by/4.0/
Changes: rendered to 256 x 256 pixels and put on plain coloured backgrounds.
"""

SUBJECT_LICENCES = {
    "Fluent Emoji, 3D": FLUENT_LICENCE,
    "Firefox OS Emoji": FIREFOX_LICENCE,
    "Emoji One 2": EMOJIONE_LICENCE,
}

MODEL_NOTICE = """\
The weights in this folder were trained by this project from scratch, and are offered under the Apache License,
Version 2.0 (LICENSE-APACHE-2.0.txt). They were trained on the artwork below, whose licences ask for the notices below.
Pictures that resemble the artwork remain under the artwork's licence.
"""


def write_model_licences(folder: Path) -> None:
    """Write the notices and licence texts of a model's folder.

    Args:
        folder: Where they go.
    """
    line = "\n" + "-" * 72 + "\n\n"
    notices = line.join((MODEL_NOTICE, FLUENT_LICENCE, NOTO_NOTICE, TWEMOJI_NOTICE))
    (folder / "NOTICE.txt").write_text(notices)
    shutil.copyfile(APACHE_LICENCE, folder / "LICENSE-APACHE-2.0.txt")


def artwork_table() -> str:
    """The artwork as a Markdown table."""
    rows = ["| set | word in captions | package | licence |", "|---|---|---|---|"]
    for artwork in ARTWORKS:
        rows.append(
            f"| [{artwork.title}]({artwork.source}) | {artwork.style} | `{artwork.package}` {artwork.version} "
            f"| {artwork.licence} |"
        )
    return "\n".join(rows)
