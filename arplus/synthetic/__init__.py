"""Records that look like those of PersonalDialog, for demos and tests."""
