"""One run: the engine, the loop, the hooks around it, and the Ray Train job around them."""
