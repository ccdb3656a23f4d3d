"""Engines: the port and its adapters. Chosen by select.py."""
