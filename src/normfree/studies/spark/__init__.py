"""Sparse layers against dense ones ("Spark Transformer", 2025), with norms and, which the paper has not, without."""
