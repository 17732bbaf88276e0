"""Operators of our own: one folder per operator, with its mathematics, definition, reference, kernel and cases.

Reading order: ``common/schema`` and ``common/case`` (how an operator is declared and tried), one operator's folder,
``common/op.h`` and ``common/kernel.cuh`` (what its C++ is written against), ``build`` (compilers), ``library`` (running
one on arrays). ``README.md`` has the table of what was checked where.
"""
