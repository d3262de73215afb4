"""The model's inner operations, written so that nothing is computed, stored or copied twice."""
