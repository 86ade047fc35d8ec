"""Fetches the artwork and the names through npm, and unpacks them."""

import json
import shutil
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path

from .settings import ARTWORKS, EMOJIONE, FIREFOX, KEYWORDS_PACKAGE, NAMES_PACKAGE, Folders


def package_folder(folders: Folders, package: str, version: str) -> Path:
    """Folder that holds an unpacked package.

    Args:
        folders: Where the build works.
        package: Name, with or without a scope.
        version: Version.
    """
    return folders.packages / f"{package.removeprefix('@').replace('/', '-')}-{version}"


def fetch(folders: Folders) -> None:
    """Fetch and unpack every package that is not there yet.

    Args:
        folders: Where the build works.
    """
    wanted = [(artwork.package, artwork.version) for artwork in (*ARTWORKS, FIREFOX, EMOJIONE)] + [
        NAMES_PACKAGE,
        KEYWORDS_PACKAGE,
    ]
    missing = [item for item in wanted if not package_folder(folders, *item).exists()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise SystemExit("npm is not installed: it fetches the artwork packages. Install Node.js and start again.")
    folders.packages.mkdir(parents=True, exist_ok=True)
    for package, version in missing:
        print(f"fetching {package}@{version}")
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        if subprocess.run(command, cwd=folders.packages, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(f"npm could not fetch {package}@{version}: see its message above, then start again.")
        unpack(package_folder(folders, package, version))


def unpack(folder: Path) -> None:
    """Unpack a fetched package; the folder appears only once it is complete.

    Args:
        folder: Where to; the package lies beside it under the same name with `.tgz`.
    """
    partial = folder.with_name(folder.name + ".partial")
    with tarfile.open(folder.with_name(folder.name + ".tgz")) as package:
        package.extractall(partial, filter="data")
    (partial / "package").rename(folder)
    partial.rmdir()


@lru_cache
def read_json(path: Path) -> dict:
    """Content of a JSON file, read once.

    Args:
        path: The file.
    """
    return json.loads(path.read_text(encoding="utf-8"))
