"""How the pages in this folder become a site: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import celery_mem

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "celery-mem"
version = release = celery_mem.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "settings_table",
]
html_theme = "furo"
html_title = f"celery-mem {release}"
html_show_copyright = False
html_copy_source = False

nitpicky = True  # a name that leads nowhere is an error,
nitpick_ignore_regex = [("py:class", r"(?!celery_mem\.).*")]  # if it is ours: other sites are not asked
myst_heading_anchors = 3  # links may name a section: page.md#section

default_role = "literal"  # docstrings write `code` as all of this project does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_rtype = False

OWN_USE = "own use"
"""A method whose docstring says that it is for this package's (or the client's) own use has no place here."""


def is_left_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Say whether the reference leaves a member out; None leaves that to Sphinx."""
    return True if OWN_USE in (getattr(obj, "__doc__", None) or "") else None


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("autodoc-skip-member", is_left_out)
