"""Benchmarks that run where you are: `distprop bench ...`. Each compares what it measures with something in one run."""
