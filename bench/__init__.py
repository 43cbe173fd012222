"""Benchmarks: `freeflow`, Docker's `overlay` and the host network, on two hosts in namespaces."""
