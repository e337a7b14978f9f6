"""Fine-tuning with LoRA: from options to a result that loads like the original.

Modules:
    run                      `train`: check everything, train, write the result
    warm_start               `--adapter`: find it, take its shape and base, load its weights
    merge                    `merge_adapter`: an adapter and its base to one model
    trainer                  the training loop
    sampler                  which examples make an optimizer step, on which process
    step                     one forward pass, and the trainable parameters with their optimizer
    gradient_checkpointing   let blocks be computed again in the backward pass; how many says memory/plan
    evaluator                evaluations while a run trains, and which was the best
    answer_eval              generated answers to evaluation examples, and their metric
    checkpoints              save, verify, find, rotate checkpoints
    resume                   may this run go on from that one; `Trainer.resume` restores its state
    log                      `log.jsonl`, the progress bar, smoothed loss
    trackers                 `--report-to`: TensorBoard and others, through transformers
    summary                  what a run says before its first step and after its last
    datasets                 open the training and evaluation sets, converting CSVs
    feature_cache            audio features of a frozen encoder, computed once
    lora                     `--train-target` to modules; wrap a model with adapters
    lora_layer               a linear layer and its LoRA adapter in one function
    output                   the output folder: tidy it, set aside an earlier run
    result                   write `final/`: from which checkpoint, in which form
    optimization/            when the weights change, and at which learning rate
    memory/                  plan memory, and go on when it runs out
"""

import logging

# bitsandbytes comes along with PEFT, and says on import that it did not find kernels of the hub; it works
# without them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
