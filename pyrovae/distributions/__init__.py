"""Distributions that the parts are made of: flows behind one adapter, mixtures, pixels with many parameters."""
