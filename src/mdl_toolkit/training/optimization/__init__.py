"""How a run changes the weights: when, and at which learning rate.

Modules:
    schedule   steps, warm-up, learning rate, when to save and to evaluate
"""
