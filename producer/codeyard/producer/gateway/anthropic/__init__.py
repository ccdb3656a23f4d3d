"""Anthropic's Messages API over the gateway's jobs. docs/anthropic.md is the page."""
