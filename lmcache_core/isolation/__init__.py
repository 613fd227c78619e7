"""Storage backends in a process of their own, so that a hung medium cannot hold the engine."""
