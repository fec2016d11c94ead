"""The sdist's file list, for setup.cfg. A MANIFEST.in would say the same, but would have to lie at the top level."""

from __future__ import annotations

import os

from setuptools.command.sdist import sdist

_DIRECTORIES = (".ci", "docs", "scripts", "tests", "workers")
_FILES = (".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


class Sdist(sdist):
    """Packs what setuptools finds by itself, and what it takes to build, run and test llloop from there."""

    def make_distribution(self) -> None:
        """Add the files and pack."""
        found = [name for name in _FILES if os.path.exists(name)]
        for top in _DIRECTORIES:
            for directory, subdirectories, names in os.walk(top):
                # Caches, of Python and of the tools.
                subdirectories[:] = [name for name in subdirectories if not name.startswith(("__pycache__", "."))]
                found += [os.path.join(directory, name) for name in names if not name.endswith((".pyc", ".pyo"))]
        self.filelist.files = sorted({*self.filelist.files, *found})
        super().make_distribution()
