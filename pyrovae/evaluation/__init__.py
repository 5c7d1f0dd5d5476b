"""Estimates of log p(x) and what is made of them."""
