"""Provide what every package needs: files, locks, processes, signals, the console.

Modules:
    console       write lines, warnings and progress to standard error
    files         write files and folders whole or not at all
    ownership     know what the toolkit wrote; nothing else is replaced or removed
    locks         locks that end with their process
    device        ask torch about the accelerator of this process
    machine       CPUs and memory that this process may use, errors that say memory ran out
    worker_pool   run jobs in several processes
    schema        refuse JSON that is not what it must be, key by key
    bounded       run a small computation with bounds on its time and memory
    launcher      read what torchrun and its like say in the environment
    distributed   join processes that train together, and sum over them
    signals       stop after a step, or at once
    run_folder    names of the files of a run, and the reader of its log
"""
