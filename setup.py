"""Where each folder lies once installed; everything else about the package stands in pyproject.toml.

In a wheel tasks, flows, app and cli lie below `lladaflow/project`: their names are anybody's, and in site-packages they
would collide. An editable installation leaves them where they are, for its checkout's developers.
"""

import sys

from setuptools import find_packages, setup

ROOMS = ("tasks", "flows", "app", "cli")
ROOT_FILES = ["*.yaml", "Makefile", "pyproject.toml", "constraints.txt", "profiles/*.yaml"]
ROOT_FILES += ["README.md", "AGENTS.md", "CONTRIBUTING.md", "LICENSE", ".gitignore", ".dvcignore", ".dvc/config"]
DATA = ["*.yaml", "accelerate/*.yaml", "*.json", "*.css", "*.html", "*.sh", "*.jinja", "py.typed"]

library = find_packages(include=["llada_core", "llada_core.*"])
rooms = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])
homes = {"lladaflow": "cli/wheel"}
if "editable_wheel" in sys.argv:
    packages = [*library, *rooms, *homes]
else:
    homes |= {"lladaflow.project": ".", **{f"lladaflow.project.{room}": room.replace(".", "/") for room in rooms}}
    packages = [*library, *homes]

setup(packages=packages, package_dir=homes, package_data={"": DATA, "lladaflow.project": ROOT_FILES})
