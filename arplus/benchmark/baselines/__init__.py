"""What the benchmarks compare with: the paper's code, Hugging Face's BART and datasets, DuckDB and Polars."""
