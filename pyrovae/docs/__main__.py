"""Build the reference documentation: `python -m pyrovae.docs FOLDER`, HTML by pdoc from the docstrings and the pages here.

A warning of pdoc and a public name without a docstring are errors.
"""

import argparse
import importlib
import inspect
import re
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

from torch import nn

import pyrovae

__all__ = ["build", "to_markdown"]

_LABEL = re.compile(r"(Shapes|Raises|Returns|Source|Sources)\b(?= |:)")
_ARGUMENT = re.compile(r"((?:\w+(?:, )?)+): ")


def build(folder: Path) -> None:
    """Write the reference to `folder`; `index.html` is its start.

    Raises UserWarning for what pdoc warns of, and RuntimeError for a public name without a docstring.
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

    foreign = [inspect.getdoc(nn.Module.__init__), inspect.getdoc(nn.Module.extra_repr)]  # inherited, and no help here

    @pass_context
    def convert(context: Context, docstring: str) -> str:
        if docstring in foreign:
            return ""
        name = context["module"].fullname
        if name == "pyrovae" and docstring == pyrovae.__doc__:
            docstring += "\n\nThe bounds explained, what a seed promises, parts of your own, benchmarks and more: `pyrovae.docs`."
        if name == "pyrovae.docs":
            return pdoc.docstrings.convert(
                docstring, "markdown", context["module"].source_file
            )  # puts figures into the page
        return to_markdown(docstring)

    filters = pdoc.render.env.filters
    assert filters["to_markdown"] is to_markdown_with_context, "pdoc names the filter otherwise"
    filters["to_markdown"] = convert
    pdoc.render.configure(docformat="markdown", include_undocumented=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nested = (name for name in modules if name.count(".") > 1)
            pdoc.pdoc(
                "pyrovae", "pyrovae.docs", *nested, r"!pyrovae\.docs\.", output_directory=folder
            )  # `__all__` says which
    finally:
        filters["to_markdown"] = to_markdown_with_context


def to_markdown(docstring: str) -> str:
    """A docstring of this library (sentence, equation, arguments, shapes, errors, source) as Markdown.

    >>> print(to_markdown("Draw a code.\\n\\nz ~ q(z|x)   for each x\\n\\nx: data (N, *shape)\\n    in batches"))
    Draw a code.
    <BLANKLINE>
    ```text
    z ~ q(z|x)   for each x
    ```
    <BLANKLINE>
    * **x**: data (N, \\*shape) in batches
    """
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", docstring.strip()) if block.strip())


def _block(block: str) -> str:
    lines = textwrap.dedent(block).splitlines()
    if lines[0].startswith(">>>"):
        return _fenced(lines, "python")
    outer = [line for line in lines if not line.startswith(" ")]
    if label := _LABEL.match(lines[0]):
        return f"**{label.group()}**" + _escaped(" ".join(map(str.strip, lines))[label.end() :])
    if outer[0] == lines[0] and all(_ARGUMENT.match(line) for line in outer):
        items = re.split(r"\n(?! )", "\n".join(lines))
        parts = [re.sub(r"\s+", " ", item).split(": ", 1) for item in items]
        return "\n".join(f"* **{_escaped(name)}**: {_escaped(text)}" for name, text in parts)
    # Equations are set off by wide gaps, or are short lines without a full stop.
    if any("  " in line.strip() for line in lines) or (re.search(r" [=~] |<=|>=", block) and not block.endswith(".")):
        return _fenced(lines, "text")
    return _escaped(" ".join(map(str.strip, lines)))


def _fenced(lines: list[str], language: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _escaped(text: str) -> str:
    """Without meaning for Markdown, except between backticks."""
    pieces = text.split("`")
    return "`".join(
        piece if i % 2 else re.sub(r"([*_#])", r"\\\1", piece).replace("<", "&lt;") for i, piece in enumerate(pieces)
    )


def _public_modules() -> list[str]:
    public = (getattr(pyrovae, name) for name in pyrovae.__all__)
    return [value.__name__ for value in public if isinstance(value, ModuleType)]


def _undocumented(module: ModuleType) -> list[str]:
    """Public classes, functions and methods that no docstring explains, their own or that of the contract they keep."""
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
