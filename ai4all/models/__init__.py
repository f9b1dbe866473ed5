"""Models: where they come from, how they are kept, and what may be loaded."""
