// Nothing: see before.h.
