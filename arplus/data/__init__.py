"""Raw records to batches: records, examples, prepare, dataset, collate, feed; and the generator of test records."""
