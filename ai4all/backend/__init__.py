"""Where blocks are computed: one interface, and the backends that serve it."""
