"""The training tasks: which texts each one trains on, which metric compares its checkpoints, and its default settings.

A new task on the same kinds of text is one entry of TASKS. A new kind of text also needs a chooser in
prismer/texts.py (data.py calls it), a check in text_statistics.py, and predictions and scores in prismer/evaluation.
"""

from dataclasses import dataclass

from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS, TextKind


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training task.

    Attributes:
        texts: the kinds of text that training draws from a sample and that evaluation predicts and scores. The texts
            of one image form one group, so that the image is encoded once.
        caption_prefix: whether captions follow the model's caption prefix ("A picture of").
        defaults: fields of TrainConfig whose defaults differ for this task; `freeze` says what is trained.
    """

    texts: tuple[TextKind, ...]
    caption_prefix: bool = True
    defaults: dict[str, int | float | str]


# hyper-parameters of Prismer (arXiv:2303.02506) and its released configurations
_PUBLISHED = dict(crop_min_area=0.5, flip=0.5, augment_ops=2, gradient_clipping=0.0)
_FINE_TUNING = dict(
    **_PUBLISHED,
    learning_rate=5e-5,
    min_learning_rate=0.0,
    warmup_steps=0,
    captions_per_image=1,
    freeze="freeze_vision",
)

TASKS = {
    "joint": Task(texts=(CAPTIONS, QUESTIONS), defaults={}),
    "pretrain": Task(
        texts=(CAPTIONS,),
        caption_prefix=False,
        defaults=dict(
            **_PUBLISHED,
            epochs=20,
            batch_size=1024,
            learning_rate=3e-4,
            min_learning_rate=1e-6,
            warmup_steps=2000,
            captions_per_image=1,
            questions_per_image=0,
            freeze="freeze_lang_vision",
        ),
    ),
    "caption": Task(texts=(CAPTIONS,), defaults=dict(**_FINE_TUNING, epochs=3, batch_size=256, questions_per_image=0)),
    "vqa": Task(texts=(QUESTIONS,), defaults=dict(**_FINE_TUNING, epochs=10, batch_size=512, questions_per_image=1)),
    "classify": Task(texts=(CLASSES,), defaults=dict(**_FINE_TUNING, epochs=20, batch_size=64, questions_per_image=0)),
}
