"""Places outside this machine: buckets and servers, reached through fsspec, and what is kept of them on this disk.

A place is a `Path` for a local folder and a `str` such as s3://bucket/folder for any other. fsspec is imported by
`objects.py` alone, and only when an object is asked for: local folders never need it.
"""
