"""What several tests use: data sets, models, checkpoints, clusters, servers."""
