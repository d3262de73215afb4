"""Measurements behind docs/benchmarks.md: each module measures one job side by side with a plain way of doing it."""
