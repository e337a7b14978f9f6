"""Model folders and adapters.

Modules:
    resolve              a name or path to a model's folder
    schemas              what configuration files must hold, and how their keys belong together
    config_files         configuration files, refused by file and key where they hold something else
    hub                  a name to a folder, from Hugging Face, ModelScope or their caches
    loading              a model with dtype, device and quantization; adapters on their base
    tokenizer_files      tokenizer, chat template and special tokens of a folder
    provenance           `mdl-toolkit.json`: where a result comes from
    safetensors_stream   safetensors read and written tensor by tensor
    adapter              what an adapter does to each tensor of its base
    vllm_lora            what vLLM needs to know of an adapter, and what it cannot apply
    merge                adapter and base to a folder, verified before it is put in place
    push                 `push`: a folder to Hugging Face or ModelScope
    model_card           the README of a result
"""
