"""Running, inspecting and validating arbitrary Pyro programs."""
