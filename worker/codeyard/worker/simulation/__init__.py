"""A discrete-event simulator of a fleet. It drives the very policy objects the worker runs."""
