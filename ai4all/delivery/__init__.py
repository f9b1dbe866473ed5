"""Getting results to the coordinator: the spool that keeps them and the policy of reconnecting."""
