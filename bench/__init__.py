"""What the promises cost: `freeflow` beside Docker's `overlay` beside the host network, on two hosts in namespaces."""
