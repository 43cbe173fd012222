"""The relay without routers: its requests, its rings, and faults of its transport."""
