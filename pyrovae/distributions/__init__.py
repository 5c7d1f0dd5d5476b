"""Distributions for priors, guides and likelihoods: an adapter for zuko's flows, mixtures, binary images, pixels."""
