"""Random numbers."""
import numpy as np

PURPOSES = ["batch", "generate", "held out", "split", "roll-out"]


def philox(seed, stream, purpose):
    """A random generator for each (seed, stream, purpose): no two of them share a number."""
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, PURPOSES.index(purpose)]))
