"""Memory of a training: planned before weights are loaded, and what to do when it runs out.

Modules:
    plan          bytes of weights, adapters, optimizer and activations; what checkpointing may keep
    activations   activations of one step, in bytes
    forecast      memory, steps and arithmetic of a training, for `check`
    oom           run in micro-batches, halving their size after each out-of-memory error
"""
