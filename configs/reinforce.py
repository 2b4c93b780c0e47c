"""Stage `reinforce`: a trained transformer learns from rewards of the pictures that it draws, or of its words about some (GRPO).

mmgen train --config reinforce:quickstart --workdir runs/reinforce --config.init=runs/transformer
"""

import ml_collections

from mmgen.runtime import config as configs
from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING

VARIANTS = ("quickstart", "preview", "reference", "reading", "tiny")


def get_config(variant):
    base = configs.load(f"transformer:{'reference' if variant == 'reading' else variant}")  # whose run is in config.init
    c = ml_collections.ConfigDict()
    c.stage = "reinforce"
    c.seed = 0
    c.model, c.sampling = base.model, base.sampling

    c.data = d = ml_collections.ConfigDict()
    d.categories = ("counting",)  # of the world's prompts, in turns
    d.languages = ("en",)
    d.size = (32, 32)  # of the pictures, (width, height) in pixels
    d.batch_size, d.group = 128, 8  # pictures a step; how many of them one prompt asks for
    d.slots = 64  # pictures that are drawn at once
    d.workers = 0  # processes that reward pictures; 0: none but the run's own
    d.temperature, d.keep_mode = 1.0, False  # as pictures are drawn: see sampling/strategies.py
    d.words = 48  # tokens of an answer in words, at most
    d.longest = 104  # tokens of a row: a prompt and its picture, or its answers in words
    d.row_length = base.data.row_length  # of whoever samples from the run

    # (NAME, WEIGHT), ...: functions of mmgen/world/rewards.py or "package.module:function"
    c.rewards = (("judge", 1.0),)
    c.updates = 1  # steps of the optimizer for what one step has drawn, each by another part of it
    c.loss = dict(kl=0.02, clip=(0.2, 0.2), normalise=False)

    c.steps = 100
    c.optimizer = OPTIMIZER | dict(name="adamw", learning_rate=3e-4, warmup=5, final=1.0, beta2=0.95)
    c.ema = 0.0
    c.held_out = dict(prompts=128)  # of the world's valid split, one picture each, drawn as for training
    c.log_every, c.evaluate_every, c.save_every, c.keep = 1, 25, 10, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True

    if variant == "preview":
        d.size = (64, 64)
        d.categories = ("single_object", "two_object", "counting", "position", "color_attribution")
        c.steps = 200
    if variant == "reference":  # on a GPU, after transformer:reference-4
        d.size, d.languages, d.longest = (64, 64), ("en", "zh"), 640  # a multiple of 128, as the kernel wants
        d.categories = (
            "edit", "counting", "position", "edit", "two_object", "sign", "edit", "color_attribution", "style", "single_object",
        )  # fmt: skip
        d.batch_size, d.slots, d.workers, c.accumulate = 256, 256, 14, 2
        c.loss.kl, c.optimizer.learning_rate, c.steps = 0.02, 2e-4, 77
        c.evaluate_every, c.save_every, c.keep = 25, 25, 8
    if variant == "reading":  # what the released model says of pictures, on two CPU cores
        d.categories, d.languages = ("caption", "detail"), ("en", "zh")
        d.size, d.words, d.longest = (64, 64), 76, 512
        d.batch_size, c.accumulate = 128, 64  # parts of which most have nothing to learn
        c.model.dtype = "float32"  # which a CPU is faster with
        c.loss.kl, c.ema, c.steps, c.optimizer.learning_rate, c.optimizer.final = 0.0, 0.95, 220, 7e-5, 0.1
        c.evaluate_every, c.save_every, c.held_out.prompts = 50, 20, 64
    if variant == "tiny":  # for tests: seconds
        d.batch_size, d.group, d.slots = 4, 2, 4
        c.steps, c.held_out.prompts = 4, 4
        c.log_every, c.evaluate_every, c.save_every = 1, 2, 2
    return c
