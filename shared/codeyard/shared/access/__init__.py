"""Credentials that lie in the store: API keys."""
