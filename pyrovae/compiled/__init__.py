"""A program recorded as a pure tensor function, and compiled."""
