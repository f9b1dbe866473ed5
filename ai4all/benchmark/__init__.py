"""What this machine can do: the benchmark suite, its scores, and where they are kept."""
