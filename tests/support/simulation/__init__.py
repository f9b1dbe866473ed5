"""A deterministic simulation of the whole control plane on virtual time. See ``run``."""
