"""Metrics of replies, honest and paper-compatible, and the evaluation of a checkpoint."""
