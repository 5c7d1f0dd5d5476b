"""Pages on the bounds, reproducibility, parts of your own and what is written by hand; `python -m pyrovae.docs FOLDER` builds them in."""

from pathlib import Path

__all__: list[str] = []

PAGES = ("bounds.md", "reproducibility.md", "own_parts.md", "by_hand.md")

__doc__ = "\n\n".join((Path(__file__).parent / page).read_text(encoding="utf-8") for page in PAGES)
