"""Files, locks, processes, signals and the console: what every package needs.

Modules:
    console       lines, warnings and progress on standard error
    files         put files and folders in place, whole or not at all
    locks         locks that end with their process
    worker_pool   work in several processes
    machine       memory that is free, and errors that say it ran out
    run_folder    names of what lies in a run's folder, and the reader of its log
    distributed   several processes that train together
    signals       stop politely, then at once
"""
