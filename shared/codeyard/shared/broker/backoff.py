"""How long to wait before trying a server again."""

import random

FIRST_S = 0.1
LONGEST_S = 3.0  # a restarted broker is found within 5 s, connecting and consuming included


def backoff_s(failures: int) -> float:
    """Seconds before the next try, after `failures` in a row (1 or more): doubles up to LONGEST_S, and
    between half and all of it by chance, so that a fleet does not come back to a restarted server at once."""
    ceiling = min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 1, 10))
    return ceiling * random.uniform(0.5, 1.0)
