"""Any Pyro program: its runs, what it is and why it may be refused, whose parameters are whose, and its recording."""
