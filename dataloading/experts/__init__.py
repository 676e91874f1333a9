"""The expert networks and the engine that labels images with them."""
