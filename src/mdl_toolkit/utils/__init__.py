"""What every package needs and no reader looks for first.

Modules:
    console       lines, warnings and progress on standard error
    files         put files and folders in place, whole or not at all
    worker_pool   work in several processes
    machine       memory that is free
    distributed   several processes that train together
    signals       stop politely, then at once
"""
