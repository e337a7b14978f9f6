"""Serve a model to other programs.

Modules:
    vllm_plugin   what vLLM calls in each of its processes, so that it takes the model from here
    vllm_model    MiDashengLM of vLLM's parts: float32 front end, each clip alone, LoRA in all three parts
"""
