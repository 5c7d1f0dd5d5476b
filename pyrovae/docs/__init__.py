"""The documentation pages; `python -m pyrovae.docs` builds them, and the reference."""

from pathlib import Path

__all__: list[str] = []

PAGES = (
    "bounds.md",
    "training.md",
    "reproducibility.md",
    "conditional.md",
    "own_parts.md",
    "missing_values.md",
    "benchmarks.md",
    "comparison.md",
    "architecture.md",
    "by_hand.md",
)

__doc__ = "\n\n".join((Path(__file__).parent / page).read_text(encoding="utf-8") for page in PAGES)

__docformat__ = "markdown"
