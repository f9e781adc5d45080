"""The documentation as one site: guides, operators, results, notebooks and API (`make docs`).

Sphinx reads the repository itself, whose pages link to each other and to sources and results by relative paths, as they
do on a code host. So nothing is copied, and a link that leads nowhere is an error here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

from fastvae import __version__

project = "fastvae"
author = "The fastvae authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docstrings",
    "navigation",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "benchmarks/results/**"]
exclude_patterns = ["docs/site/**"]

# Links between pages lead to headings as a code host names them.
myst_heading_anchors = 4
# Notebooks are shown as they were committed; the tests run them (tests/test_docs.py), `make notebooks` renews them.
nb_execution_mode = "off"
nb_merge_streams = True

autosummary_generate = False
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False

# No other project's index is asked for, so that a build needs no network: torch's and Python's names stay text, and
# so does Run, which only a private field of callbacks' Training has.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(Tensor|Run|(abc|nn|torch|numpy|collections|lightning|pytorch_ood)\..*)")
]

html_theme = "furo"
html_title = f"fastvae {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/extra"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "native"
