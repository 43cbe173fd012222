"""The relay, without routers: its control protocol, its rings, and what goes wrong on the way."""
