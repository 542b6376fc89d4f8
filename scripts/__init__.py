"""What runs outside the product: quick start, benchmarks, generators of documentation."""
