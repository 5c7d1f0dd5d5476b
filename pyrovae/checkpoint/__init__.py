"""Checkpoints: tensors and plain values only, so that loading a file never runs code from it."""

from pyrovae.checkpoint.pair import load, save

__all__ = ["load", "save"]
