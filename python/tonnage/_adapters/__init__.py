"""One small adapter a framework: how a buffer becomes its tensor, and a tensor a buffer.

The contract is written down where it is used, in `crates/python/src/dropin/adapter.rs`.
"""
