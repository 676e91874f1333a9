"""img2dataset's output with the captions of a list of addresses (Conceptual Captions, SBU, BLIP) -> records."""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from prismer.dataloading.sources.annotations import Findings, clean_captions
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.records import ImageRecord, ImageRecords
from prismer.dataloading.sources.webdataset_tars import tar_records
from prismer.errors import InputError
from prismer.reading import open_regular, read_bytes, read_json


class UrlCaptions:
    """Address -> caption, of lists with millions of rows: captions stay in the file, a row takes 24 bytes of memory.

    Args:
        files: one TSV of addresses and captions in either order (Conceptual Captions); one JSON list of
            {"url", "caption"} (BLIP) or object of "image_urls" and "captions" (SBU); or two texts, whose lines are
            addresses and captions (SBU).

    Attributes:
        file: the file that holds the captions.
        odd: number of lines or rows without an address.
        first_odd: which is the first of them.

    Raises:
        ValueError: if a file has another form, or two texts differ in length.
    """

    def __init__(self, files: Sequence[str | Path]):
        self.file, self.odd, self.first_odd = Path(files[-1]), 0, ""
        self._hashes, self._starts, self._sizes = array("Q"), array("q"), array("q")
        self._text: bytes | None = None
        if len(files) == 2:
            self._read_texts(Path(files[0]), Path(files[1]))
        elif len(files) != 1:
            raise InputError(f"{len(files)} lists of captions are named; give one, or the two texts of SBU")
        elif self.file.suffix.lower() == ".json":
            self._read_json()
        else:
            self._read_tsv()
        if not self._hashes:
            raise InputError(
                f"{self.file} has no line of an address and a caption; give a TSV of both, a JSON of SBU or BLIP, or "
                f"the two texts of SBU"
            )
        hashes = np.frombuffer(self._hashes, np.uint64)
        # stable, so that the first caption of an address is found
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._open = None if self._text is not None else open_regular(self.file)

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, url: str) -> str | None:
        """The caption of an address; None if the list does not have it. Bad bytes become U+FFFD."""
        value = np.uint64(_hash(url.encode("utf-8", "surrogatepass")))
        place = int(np.searchsorted(self._sorted, value))
        if place == len(self._sorted) or self._sorted[place] != value:
            return None
        row = int(self._order[place])
        start, size = self._starts[row], self._sizes[row]
        if self._text is not None:
            data = self._text[start : start + size]
        else:
            data = os.pread(self._open.fileno(), size, start)
        return data.decode("utf-8", "replace")

    def _count_odd(self, place: str) -> None:
        self.odd, self.first_odd = self.odd + 1, self.first_odd or place

    def _add(self, url: bytes, start: int, size: int) -> None:
        self._hashes.append(_hash(url))
        self._starts.append(start)
        self._sizes.append(size)

    def _read_tsv(self) -> None:
        position = 0
        with open_regular(self.file) as file:
            for number, line in enumerate(file):
                start = 3 if number == 0 and line.startswith(b"\xef\xbb\xbf") else 0
                one, tab, rest = line[start:].rstrip(b"\r\n").partition(b"\t")
                two = rest.partition(b"\t")[0]
                if one.startswith(b"http") and tab:
                    self._add(one, position + start + len(one) + 1, len(two))
                elif two.startswith(b"http"):
                    self._add(two, position + start, len(one))
                # img2dataset needs a first line of names
                elif number > 0 or {one, two} != {b"url", b"caption"}:
                    self._count_odd(f"line {number + 1}")
                position += len(line)

    def _read_texts(self, first: Path, second: Path) -> None:
        urls, captions = (
            read_bytes(path).decode("utf-8-sig", "replace").rstrip("\n").split("\n") for path in (first, second)
        )
        if captions and captions[0].startswith("http"):
            self.file, urls, captions = first, captions, urls
        if len(urls) != len(captions):
            raise InputError(
                f"{first} and {second} have {len(urls)} addresses and {len(captions)} captions; give two files of one "
                f"length"
            )
        self._take(urls, captions)

    def _read_json(self) -> None:
        content = read_json(self.file, lenient=True)
        if isinstance(content, dict):
            urls, captions = content.get("image_urls"), content.get("captions")
        else:
            rows = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []
            urls, captions = [row.get("url") for row in rows], [row.get("caption") for row in rows]
        if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
            raise InputError(
                f'{self.file} is not {{"image_urls": [...], "captions": [...]}} of one length, nor a list of '
                f'{{"url", "caption"}}; name the list that img2dataset read'
            )
        self._take(urls, captions)

    def _take(self, urls: list, captions: list) -> None:
        parts, position = [], 0
        for number, (url, caption) in enumerate(zip(urls, captions, strict=True)):
            if not isinstance(url, str) or not isinstance(caption, str) or not url.startswith("http"):
                self._count_odd(f"row {number + 1}")
                continue
            data = caption.rstrip("\r").encode("utf-8", "replace")
            self._add(url.strip().encode("utf-8", "surrogatepass"), position, len(data))
            parts.append(data)
            position += len(data)
        self._text = b"".join(parts)


def _hash(url: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(url, digest_size=8).digest(), "little")


def web_records(
    folder: str | Path, annotations: Sequence[str | Path], *, labels: str | Path | None = None
) -> ImageRecords:
    """The images that img2dataset downloaded, as folders or tars, with the captions of the list.

    The `url` in the JSON of an image finds its caption. An image that the list does not have keeps the caption beside
    it; the report counts those without any.

    Args:
        folder: the output of img2dataset.
        annotations: the list or lists, see UrlCaptions.
        labels: as for `folder_records`, if the images are files.

    Raises:
        ValueError: if there are no images, or a list has another form.
    """
    is_tars = Path(folder).is_dir() and any(name.lower().endswith(".tar") for name in os.listdir(folder))
    if is_tars and labels is not None:
        raise InputError(f"{folder} holds tars, to which label maps cannot be joined; leave out --labels")
    base = tar_records(folder) if is_tars else folder_records(folder, labels=labels)
    captions = UrlCaptions(annotations)
    others = list(base.others)

    def iterate() -> Iterator[ImageRecord]:
        findings = Findings()
        for record in base:
            url = record.meta.get("url")
            caption = captions.get(url) if isinstance(url, str) else None
            if caption is not None:
                texts = clean_captions([caption], captions.file, url, findings)
                record = replace(record, meta={**record.meta, "captions": texts})
            elif not record.fault and not record.meta.get("captions"):
                what = "images have no caption beside them and are not in the list"
                findings.count(captions.file, what, url or record.key)
            yield record
        if captions.odd:
            what = "rows have no address and are not read"
            findings.count(captions.file, what, captions.first_odd, captions.odd)
        others[len(base.others) :] = findings.others()

    return ImageRecords(base.count, iterate, others=others)
