"""DVC's settings of this folder (.dvc/config.local), read and written by the library that DVC itself uses.

Knows where the shared cache lies and that there may be no git; knows neither stages nor runs.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

from configobj import ConfigObj

from tasks.folders import has_git


def configure_workspace(root: Path, place: Path) -> None:
    """The checkout's own settings for a workspace of it: the same cache and remotes, told from where it lies.

    A path in DVC's settings counts from the folder that holds them; a relative one moves with the project.
    """
    shared, own = _settings(root, "config"), _settings(root, "config.local")
    settings = ConfigObj(own.dict(), encoding="utf-8", interpolation=False)
    given = own.get("cache", {}).get("dir") or shared.get("cache", {}).get("dir") or "cache"
    settings.setdefault("cache", {})["dir"] = _from(place, root, given)
    for part in (shared, own):
        for name, section in part.items():
            if name.strip("'").startswith("remote ") and _is_relative(str(section.get("url", ""))):
                settings.setdefault(name, {})["url"] = _from(place, root, section["url"])
    if not has_git(root):
        settings.setdefault("core", {})["no_scm"] = "true"
    _write(settings, place)


def configure_without_git(root: Path) -> None:
    """Tell DVC that there is no git here (a tarball): without it every command fails."""
    settings = _settings(root, "config.local")
    if not (root / ".git").exists() and "no_scm" not in settings.get("core", {}):
        settings.setdefault("core", {})["no_scm"] = "true"
        _write(settings, root)


def _settings(root: Path, name: str) -> ConfigObj:
    file = root / ".dvc" / name
    return ConfigObj(str(file) if file.exists() else [], encoding="utf-8", interpolation=False)


def _is_relative(url: str) -> bool:
    return bool(url) and not urlsplit(url).scheme and not os.path.isabs(url)


def _from(place: Path, root: Path, given: str) -> str:
    """A path of `root`'s settings as one of `place`'s: relative where it lies in the project."""
    whole = (root.resolve() / ".dvc" / given).resolve()
    if whole.is_relative_to(root.resolve()):
        return os.path.relpath(whole, place.resolve() / ".dvc")
    return str(whole)


def _write(settings: ConfigObj, root: Path) -> None:
    file = root / ".dvc" / "config.local"
    if settings != _settings(root, "config.local"):
        settings.filename = str(file.with_suffix(".new"))
        settings.write()
        os.replace(settings.filename, file)
