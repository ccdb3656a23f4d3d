"""Records, events and results: the port, the protocol, and two adapters. Opened by shared.connect."""
