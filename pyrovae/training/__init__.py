"""Training with Pyro's `SVI`: the loop, checkpoints, and checks of what a step does."""
