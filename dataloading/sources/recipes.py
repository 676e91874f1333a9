"""How to get the datasets of the published training set (Prismer, arXiv:2303.02506, section 4): commands, for a shell.

Nothing here is run. Sizes are those that the publishers state. Those of downloaded images follow from the table of
sizes in the README of img2dataset, 30 GB for a million JPEGs of 256 x 256 pixels, with a longer side of 1.4 x 256.
"""

from dataclasses import dataclass

_GOOGLE = "free for any purpose, with acknowledgement of Google LLC appreciated; the images belong to their owners"
_FLICKR = "the images belong to their owners on Flickr"
_COCO = "http://images.cocodataset.org"
_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
_GENOME_IMAGES = "https://cs.stanford.edu/people/rak248/VG_100K_2"


@dataclass(frozen=True)
class Recipe:
    """How to get one dataset.

    Attributes:
        title: its name.
        pairs: the pairs of images and texts, in words.
        size: the disk that its files need before the import, in words.
        licence: of texts and images, in words.
        download: commands that fetch it; those that begin with # are steps for a person.
        imports: commands that make datasets of it.
    """

    title: str
    pairs: str
    size: str
    licence: str
    download: tuple[str, ...]
    imports: tuple[str, ...]


def _img2dataset(url_list: str, form: str, url: str, caption: str, folder: str) -> str:
    """The command that downloads a list: images of 256 px on the shorter side, in tars of 10,000."""
    # option names of img2dataset 1.47.0, checked on 2026-11-30 against the signature of img2dataset.download
    return (
        f"img2dataset --url_list {url_list} --input_format {form} --url_col {url} --caption_col {caption} "
        f"--output_format webdataset --output_folder {folder} --image_size 256 --resize_mode keep_ratio "
        f"--resize_only_if_bigger True --processes_count 16 --thread_count 64 --number_sample_per_shard 10000 "
        f"--compute_hash None"
    )


RECIPES = {
    "cc12m": Recipe(
        "Conceptual 12M",
        "12,423,374 addresses with a caption each; a part of them no longer answers",
        "2.6 GB for the list, at most 520 GB for the images",
        _GOOGLE,
        (
            "curl -LO https://storage.googleapis.com/conceptual_12m/cc12m.tsv",
            "sed -i '1s/^/url\\tcaption\\n/' cc12m.tsv",
            "pip install img2dataset",
            _img2dataset("cc12m.tsv", "tsv", "url", "caption", "cc12m"),
        ),
        ("prismer data import web cc12m --annotations cc12m.tsv --source CC12M --out data/cc12m",),
    ),
    "cc3m": Recipe(
        "Conceptual Captions",
        "3,318,333 addresses with a caption each; 2,905,954 images answered in 2021",
        "0.5 GB for the list, at most 140 GB for the images",
        _GOOGLE,
        (
            "# save Train_GCC-training.tsv from https://ai.google.com/research/ConceptualCaptions/download",
            "sed -i '1s/^/caption\\turl\\n/' Train_GCC-training.tsv",
            "pip install img2dataset",
            _img2dataset("Train_GCC-training.tsv", "tsv", "url", "caption", "cc3m"),
        ),
        ("prismer data import web cc3m --annotations Train_GCC-training.tsv --source CC3M --out data/cc3m",),
    ),
    "sbu": Recipe(
        "SBU captioned photos",
        "1,000,000 addresses with a caption each, of which about 860,000 can be downloaded",
        "0.2 GB for the list, at most 45 GB for the images",
        f"none stated; {_FLICKR}",
        (
            "curl -LO https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz",
            "tar -xzf sbu-captions-all.tar.gz",
            "pip install img2dataset",
            _img2dataset("sbu-captions-all.json", "json", "image_urls", "captions", "sbu"),
        ),
        ("prismer data import web sbu --annotations sbu-captions-all.json --source SBU --out data/sbu",),
    ),
    "coco": Recipe(
        "COCO 2014 with the splits of Karpathy",
        "566,747 captions of 113,287 images for training; 5,000 images each for validation and test",
        "21 GB, and as much again while the archives are kept",
        f"captions CC BY 4.0; {_FLICKR}",
        (
            "mkdir -p coco",
            f"curl -L -o coco/train2014.zip {_COCO}/zips/train2014.zip",
            f"curl -L -o coco/val2014.zip {_COCO}/zips/val2014.zip",
            f"curl -L -o coco/annotations.zip {_COCO}/annotations/annotations_trainval2014.zip",
            "curl -L -o coco/karpathy.zip https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            "for file in coco/*.zip; do unzip -q $file -d coco; done",
        ),
        tuple(
            f"prismer data import coco coco --split {split} --annotations coco/dataset_coco.json --source COCO "
            f"--out data/coco/{split.split('+')[0]}"
            for split in ("train+restval", "val", "test")
        ),
    ),
    "vg": Recipe(
        "Visual Genome",
        "5.4 million descriptions of regions and 1.7 million questions on 108,077 images",
        "17 GB, and as much again while the archives are kept",
        "CC BY 4.0",
        (
            "mkdir -p vg",
            *(f"curl -L -o vg/{name}.zip {_GENOME_IMAGES}/{name}.zip" for name in ("images", "images2")),
            *(
                f"curl -L -o vg/{name}.zip {_GENOME}/{name}.json.zip"
                for name in ("image_data", "region_descriptions", "question_answers")
            ),
            "for file in vg/*.zip; do unzip -q $file -d vg; done",
        ),
        ("prismer data import vg vg --source 'Visual Genome' --licence 'CC BY 4.0' --out data/vg",),
    ),
}
# what the published models were trained on, and where such web captions are
PUBLISHED_SET = (
    "The published models were trained on 12.7 million pairs of these five datasets. Their web part was filtered and "
    "captioned anew. BLIP publishes such a list, of CC12M, CC3M and SBU together: download it with the commands of "
    "cc12m, with --input_format json instead of tsv.",
    "https://storage.googleapis.com/sfr-vision-language-research/BLIP/datasets/ccs_synthetic_filtered_large.json",
)
