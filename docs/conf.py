"""The documentation site, built by ``sphinx-build -W docs build/site``.

FLOWPROX_DOCS_REPOSITORY    ORG/NAME on GitHub, by default GITHUB_REPOSITORY, which GitHub's runners set: the gallery's
                            notebooks begin by installing from there, and their pages have a button that opens them in
                            Colab, from the branch gh-pages with the built site; without it they have neither
-D plot_gallery=0           leave the gallery's scripts unexecuted, which takes 45 seconds less

Links into the reference of deepinv, Python and torch need their inventories, from the network; a site that does not answer
is left out.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import urllib.request

from sphinx.ext import autosummary

import flowprox

project = "flowprox"
author = "The flowprox developers"
copyright = author
version = release = flowprox.__version__
repository = os.environ.get("FLOWPROX_DOCS_REPOSITORY") or os.environ.get("GITHUB_REPOSITORY", "")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["gallery"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = "flowprox"
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"image_light": "_static/icon.svg", "image_dark": "_static/icon.svg", "text": "flowprox"},
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"index": [], "try": []}

# Others' references ---------------------------------------------------------------------------------------------------

_OTHERS = {
    "deepinv": "https://deepinv.github.io/deepinv",
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
}


def _answers(site: str) -> bool:
    try:
        urllib.request.urlopen(f"{site}/objects.inv", timeout=5).close()
    except OSError:
        return False
    return True


intersphinx_mapping = {name: (site, None) for name, site in _OTHERS.items() if _answers(site)}

# Reference ------------------------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "show-inheritance": True, "no-value": True, "exclude-members": "forward"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


autosummary.WELL_KNOWN_ABBREVIATIONS += ("Eq.", "Eqs.", "Sec.", "Fig.", "App.")  # which end no sentence


def _submodules(package: str) -> list[str]:
    return [f"{package}.{info.name}" for info in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _defined(module: str) -> list[str]:
    """Names that a module defines, in its order."""
    nodes = ast.parse(inspect.getsource(importlib.import_module(module))).body
    targets = [getattr(node, "targets", [getattr(node, "target", node)])[0] for node in nodes]
    return [name for one in targets if (name := getattr(one, "name", getattr(one, "id", "")))]


def _exports(package: str) -> list[str]:
    """What a package hands on, under the name of the module that documents it."""
    names = set(getattr(importlib.import_module(package), "__all__", ()))
    homes = {module: _defined(module) for module in _submodules(package)}
    return [f"~{home.rpartition('.')[2]}.{name}" for home, own in homes.items() for name in own if name in names]


_PACKAGES = [name for name in _submodules("flowprox") if hasattr(importlib.import_module(name), "__path__")]
autosummary_context = {"exports": {name: _exports(name) for name in [*_PACKAGES, "flowprox.evaluation.report"]}}

_SECTION = re.compile(r"(Arguments|Attributes|Example|Raises|References|Returns):$")
_INDENT = re.compile(r" *")


def _indent(line: str) -> int:
    match = _INDENT.match(line)
    return match.end() if match else 0


def _escaped(text: str) -> str:
    """Docstrings are plain words, formulas and ``code``; what reStructuredText would read into them is escaped."""
    parts = re.split(r"(``.+?``|\*\*\w[^*]*\*\*)", text, flags=re.DOTALL)
    return "".join(part if i % 2 else re.sub(r"([\\*|`]|_\b)", r"\\\1", part) for i, part in enumerate(parts))


def _listed(lines: list[str]) -> list[str]:
    """References with hanging indents become a list; without them they are one entry."""
    hanging = any(_indent(line) > 4 for line in lines)
    return [f"    * {line[4:]}" if hanging and _indent(line) == 4 else line for line in lines]


def _as_rst(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Indented blocks before the sections are formulas, whose lines stay as they are."""
    result: list[str] = []
    section = ""
    for block in re.split(r"\n\n+", "\n".join(lines).strip("\n")):
        head, *rest = block.split("\n")
        if match := _SECTION.match(head):
            section = match[1]
        if section == "Example":
            result += [head, *rest]
        elif section == "References" and match:
            result += [head, *_listed(_escaped("\n".join(rest)).split("\n"))]
        elif section or _indent(head) < 4:
            result += _escaped(block).split("\n")
        else:
            result += [".. code-block:: none", "   :class: formula", "", head, *rest]
        result.append("")
    if what in ("attribute", "data", "property"):
        result[:1] = result[0].split(" ", 1)  # napoleon takes what stands before a colon in the first line for a type
    lines[:] = result


# Gallery --------------------------------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"/papers/",
    "within_subsection_order": "FileNameSortKey",
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "abort_on_example_error": True,
    "first_notebook_cell": f"%pip install git+https://github.com/{repository}" if repository else None,
}
suppress_warnings = ["config.cache"]


def _add_colab(app: object, page: str, template: str, context: dict, doctree: object) -> None:
    """The button on a page of the gallery that opens its notebook in Colab."""
    notebook = re.search(r'href="[./]*(_downloads/\w+/[\w.]+\.ipynb)"', context.get("body", ""))
    if notebook and repository:
        link = f"https://colab.research.google.com/github/{repository}/blob/gh-pages/{notebook[1]}"
        button = f'</h1>\n<p><a class="colab" href="{link}">Open in Colab</a></p>'
        context["body"] = context["body"].replace("</h1>", button, 1)


def setup(app) -> None:
    app.connect("html-page-context", _add_colab)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon
