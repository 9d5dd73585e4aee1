"""The online half: answers questions by task name from a model repository. Never imports torch, timm or evolve."""
