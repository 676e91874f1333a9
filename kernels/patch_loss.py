"""Rules for the head and loss of causal language models of transformers."""

RULES = ()
