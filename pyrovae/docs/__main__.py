"""Build the reference documentation: `python -m pyrovae.docs FOLDER`, HTML by pdoc from the docstrings and the pages here.

A warning of pdoc and a public name without a docstring are errors.
"""

import argparse
import importlib
import inspect
import re
import warnings
from pathlib import Path
from types import ModuleType

from torch import nn

import pyrovae
from pyrovae import docs

__all__ = ["build"]


def build(folder: Path) -> None:
    """Write the reference to `folder`; its first page is `index.html`.

    Raises UserWarning for each warning of pdoc, and RuntimeError for a public name without a docstring.
    """
    import pdoc
    import pdoc.docstrings
    import pdoc.render
    from jinja2 import pass_context
    from jinja2.runtime import Context
    from pdoc.render_helpers import to_markdown_with_context

    modules = ["pyrovae", *_public_modules(), "pyrovae.docs"]
    if missing := [name for module in modules for name in _undocumented(importlib.import_module(module))]:
        raise RuntimeError(f"public names without a docstring: {', '.join(missing)}")

    # Inherited from torch, and useless to our readers.
    foreign = [inspect.getdoc(nn.Module.__init__), inspect.getdoc(nn.Module.extra_repr)]

    @pass_context
    def convert(context: Context, docstring: str) -> str:
        if docstring in foreign:
            return ""
        if context["module"].fullname == "pyrovae" and docstring == pyrovae.__doc__:
            docstring += "\n\nGuides to training, conditional models, missing values, bounds and more: `pyrovae.docs`."
        if context["module"].fullname == "pyrovae.docs":
            docstring = _with_anchors(docstring)
        return to_markdown_with_context(context, docstring)

    filters = pdoc.render.env.filters
    assert filters["to_markdown"] is to_markdown_with_context, "pdoc has renamed its filter to_markdown"
    filters["to_markdown"] = convert
    pdoc.render.configure(docformat="google", include_undocumented=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nested = (name for name in modules if name.count(".") > 1)
            # `__all__` says which modules of a package are documented.
            pdoc.pdoc("pyrovae", "pyrovae.docs", *nested, r"!pyrovae\.docs\.", output_directory=folder)
    finally:
        filters["to_markdown"] = to_markdown_with_context


def _with_anchors(text: str) -> str:
    """Links between the pages lead to headings instead of files, because all of them become one page."""
    for page in docs.PAGES:
        title = (Path(docs.__file__).parent / page).read_text(encoding="utf-8").partition("\n")[0]
        anchor = re.sub(r"\W+", "-", title.lower()).strip("-")  # as pdoc makes it
        text = text.replace(f"]({page})", f"](#{anchor})").replace(f"]({page}#", "](#")
    return text


def _public_modules() -> list[str]:
    public = (getattr(pyrovae, name) for name in pyrovae.__all__)
    return [value.__name__ for value in public if isinstance(value, ModuleType)]


def _undocumented(module: ModuleType) -> list[str]:
    """Public classes, functions and methods without a docstring of their own or of their base class."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__:  # getdoc would take that of a class's base
            found.append(f"{module.__name__}.{name}")
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isfunction(method) and not inspect.getdoc(getattr(value, member)):
                found.append(f"{module.__name__}.{name}.{member}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pyrovae.docs", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/docs"), help="default: build/docs")
    folder = parser.parse_args().folder
    build(folder)
    print(folder / "index.html")
