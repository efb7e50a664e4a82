# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: byte-level BPE in which every word of the questions is one token.

Trained on questions about the first training scenes. Bytes are in the vocabulary, so that any text
can be asked; only these words mean something to the model.
"""

import random

from himap_demo import MODEL_PATH
from himap_demo.heldout import training_seed
from himap_demo.questions import ask
from himap_demo.scenes import make_scene
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
VOCABULARY = 512
"""Rows of the embedding. The tokenizer stops below it, where all words are whole."""

BEFORE_IMAGE = "USER: "
AFTER_QUESTION = " ASSISTANT:"
CHAT_TEMPLATE = (MODEL_PATH / "chat_template.jinja").read_text()
"""In training, one user turn. The rest is for what clients send."""


def build_tokenizer(scenes: int = 2000) -> PreTrainedTokenizerFast:
    """The tokenizer, the same on every call."""
    corpus = []
    for index in range(scenes):
        seed = training_seed(index)
        for question in ask(random.Random(seed), make_scene(seed), 8):
            corpus.append(f"{BEFORE_IMAGE}\n{question.text}{AFTER_QUESTION} {question.answers[0]}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[IMAGE],  # load generators leave those out of random prompts
        chat_template=CHAT_TEMPLATE,
    )
