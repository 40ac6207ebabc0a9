"""Results of other tools as records: their accuracy matrices, scored by our definitions.

A file is read by its format (`formats`), its own scores are compared with ours (`told`), and what comes out is a record
that says where it is from (`record`). It has no costs, and no device that anybody knows.
"""
