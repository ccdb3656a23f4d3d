"""Which jobs enter the engine, and when: the port, and one policy a module. Pure: no clock, no I/O."""
