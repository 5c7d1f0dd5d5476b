"""Recording a Pyro program as a pure tensor function, and compiling it: start in `record.py`."""
