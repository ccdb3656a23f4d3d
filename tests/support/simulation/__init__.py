"""A deterministic simulation of the protocol: docs/simulation-testing.md says how, tests/simulation runs it.

loop.py     time is virtual, who runs next is drawn, processes die and stall
wire.py     what happens to a call on its way to a server and back
broker.py, store.py   the two ports in memory; the contract suite holds them to what they promise
engine.py   an engine whose answer is a function of the prompt
plan.py     from a seed: who runs, which jobs, which faults
fleet.py    the real worker and producer code, as processes of the simulated world
audit.py    what must hold at every step and at the end
world.py    one schedule from a plan to its verdict
shrink.py   the shortest plan that still fails, and its trace
many.py     thousands of schedules, and what they covered
mutations.py    ways to break the protocol, each of which must be found
"""
