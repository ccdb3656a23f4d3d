"""Durable queues: the port and its two adapters. Opened by shared.connect."""
