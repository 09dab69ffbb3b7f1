"""What this package costs in time and memory, on the machine it runs on: ``normfree bench``.

Each module is one benchmark: one function that takes options, measures, and returns what it found as a dict of JSON's
types. Nothing is printed, but for what the training of a long run says on standard error.
"""
