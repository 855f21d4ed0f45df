"""Benchmarks of the Python package beside the reference's, in one run.

    python -m bench [SUITE…] [--rounds N]      suites: tensors imports load save host save4 verify

Both sides run in fresh processes, one measurement each, in alternating order; a table shows the
median of each side and their ratio. The raw samples go to bench/results/SUITE.json with the machine
and the versions. Speed and memory are measured in different processes, so that watching the memory
costs the speed nothing.
"""
