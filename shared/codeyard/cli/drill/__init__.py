"""A chaos drill: a fleet under load, faults on a seeded schedule, and an audit of every job."""
