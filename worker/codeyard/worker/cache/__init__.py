"""Loaded models of one worker, shared and bounded."""
