"""Helpers that many folders need: checks of arguments, progress, warnings, several processes."""
