"""Loading to a GPU and saving from it, beside the reference and the fast loaders.

`python -m bench.gpu --bundle .gpu --out results/` runs on a machine with an NVIDIA GPU, Python with
PyTorch, and nothing else: no network, no compiler, no Rust. `make gpu-bundle` makes the bundle.
Every measurement has a process of its own; each peer's wheel is installed into a folder of its own.
"""
