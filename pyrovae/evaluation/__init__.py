"""Estimates of log p(x), and the analyses built on them."""
