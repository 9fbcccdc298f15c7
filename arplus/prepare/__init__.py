"""A data set from records: sources, deduplication, encoding, and the data card."""
