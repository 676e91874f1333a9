"""Rules for perceiver resamplers and Q-Formers of transformers, flamingo-pytorch and open_flamingo."""

RULES = ()
