"""Callers told of their jobs' ends over HTTP (Standard Webhooks). docs/webhooks.md is the reference."""
