"""The commands of `prismer`, one file for each group."""
