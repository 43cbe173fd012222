"""freeflow-runc, the OCI runtime: the compiled program, with a fake runtime behind it."""
