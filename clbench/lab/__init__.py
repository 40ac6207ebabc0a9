"""Measurements that stand beside the runs: `clbench lab growth` compares the ways to grow a weight.

`growth.measure` measures, `record` is what it writes (JSON) and what its limits are; `clbench report` renders the
record. `record` needs no torch.
"""
