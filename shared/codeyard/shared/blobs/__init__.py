"""Bytes too large for a message or a record: long prompts, uploaded files."""
