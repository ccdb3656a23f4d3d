"""Batches: many requests in one, worked off in the bulk lane by whichever gateway is there. docs/batches.md."""
