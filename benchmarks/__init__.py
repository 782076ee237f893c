"""How fast the fused ops are, beside PyTorch's and beside what the machine allows: `make bench`, docs/benchmarks.md."""
