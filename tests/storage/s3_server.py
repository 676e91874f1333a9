"""A real S3 server on loopback: python tests/storage/s3_server.py PORT FOLDER

It is moto's, which keeps its objects in memory. The server begins with the files FOLDER/BUCKET/NAME, so that one that
was killed and started again holds the same objects.
"""

import sys
from pathlib import Path

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import run_simple


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for bucket in sorted(folder.iterdir()):
        backend.create_bucket(bucket.name, "us-east-1")
        for path in sorted(bucket.rglob("*")):
            if path.is_file():
                backend.put_object(bucket.name, str(path.relative_to(bucket)), path.read_bytes())
    run_simple("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=True)


if __name__ == "__main__":
    main()
