"""Memory of a training: planned before weights are loaded, and what to do when it runs out.

Modules:
    plan          bytes of weights, adapters, optimizer and activations; what checkpointing may keep
    activations   bytes that one step needs beside weights
    forecast      what `check` says of a training before it is run
    oom           run in micro-batches, halving their size after each out-of-memory error
"""
