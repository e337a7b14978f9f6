"""A model behind an HTTP server: the interface of OpenAI, and a page to try it; and what vLLM needs for it.

Modules:
    serve         `serve`: find and load the models, listen, or start vLLM
    app           the addresses, and their answers
    gate          who may ask, how much, and the form of a refusal
    protocol      requests as they are sent, and what they ask for
    engine        prompts to tokens: requests join the running batch of their model
    command       the command line of vLLM's server
    page          the page to try it, put together as one file from the folder `page`
    vllm_plugin   what vLLM calls in each of its processes, so that it takes the model from here
    vllm_model    MiDashengLM of vLLM's parts: float32 front end, each clip alone, LoRA in all three parts
"""
