"""What benchmarks share: their results files, their common arguments and their time limit."""
