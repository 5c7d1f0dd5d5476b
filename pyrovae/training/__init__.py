"""Training by Pyro's own `SVI`."""
