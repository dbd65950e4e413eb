"""What crosses the network: lines, results, objects, errors, windows, ids.

Everything here is pure: no I/O, no clock, no database, no randomness. Functions that need the time or a limit take it
as an argument, so each rule of the wire is proved on bytes alone.
"""
