"""Records, sessions and examples; the prepared data set; and its way to a worker's batches."""
