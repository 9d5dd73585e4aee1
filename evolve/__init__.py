"""The offline half: an evolutionary search that finds for each task a path of layers to reuse, clone, adapt or leave out."""
