"""Engine, loop, state and checkpoints of one run; the Ray Train job around them."""
