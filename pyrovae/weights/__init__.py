"""Log importance weights of any Pyro model/guide pair."""
