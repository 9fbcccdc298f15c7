"""Models that others have pretrained, as a start for ours: the one room that imports transformers (an extra)."""
