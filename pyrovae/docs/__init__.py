"""Pages on the bounds, on reproducibility and on parts of your own; `python -m pyrovae.docs FOLDER` builds the reference with them."""

from pathlib import Path

__all__: list[str] = []

PAGES = ("bounds.md", "reproducibility.md", "own_parts.md")

__doc__ = "\n\n".join((Path(__file__).parent / page).read_text(encoding="utf-8") for page in PAGES)
