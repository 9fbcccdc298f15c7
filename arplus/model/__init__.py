"""The network of the paper and its objective; imports torch and the configuration alone."""
