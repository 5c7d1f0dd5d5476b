"""Generative models p(x, z) as Pyro programs."""
