"""Helpers shared by all folders: argument checks, components, progress bars, warnings, distributed processes."""
