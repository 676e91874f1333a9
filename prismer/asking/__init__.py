"""A model asked about whole folders: what is asked, how it is read batch by batch, and the resumable job around it."""
