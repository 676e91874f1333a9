"""The ablations of Prismer's paper: `python -m prismer.ablations list|run|report`; docs/ablations.md explains them."""
