"""Training with Pyro's `SVI`.

Read `fit` first: it prepares (`preparation`), runs epochs (`steps`) and reports. A step asks `losses` for the value with
the ELBO's parts and `optimization` to move the parameters; `acceleration` records it. `first_step`, `data_order` and
`non_finite` refuse what cannot be trained. `state` is what changes, `run_file` its checkpoint.
"""
