"""Metrics of replies, standard and paper-compatible, and the evaluation of a checkpoint."""
