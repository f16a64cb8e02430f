"""What holds for all tests, set before any library reads it."""

import os

# Two workers share the cores: threads that wait for each other's cores made fits of 0.2 s take 7.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
