"""What a run leaves on storage: its folder, who may write there, checkpoints, and where a run starts."""
