"""Roots that come with munet, one `<name>.safetensors` each, written by `munet-evolve pretrain`."""
