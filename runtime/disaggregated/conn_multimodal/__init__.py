"""The connection between the two sides, after the announcement of sizes: initial and resumed transfers.

``sender`` is a room of the encode process, ``receiver`` an attempt of the language process.
"""
