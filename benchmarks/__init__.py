"""One script a question. Each prints JSON lines; the last one sums up, see benchmarks.reporting."""
