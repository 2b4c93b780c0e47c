"""Stage `refiner`: codes -> better, and larger, pixels.

mmgen train --config refiner:world --workdir runs/refiner --config.data.tokenizer=runs/tokenizer

A code of the tokenizer stands for model.scale times its patch of refined pixels, of which model.patch * 2**(grids - 1) must be
a part: the presets are for patches of 8 pixels (tokenizer:world, :emoji-f8, :photos-f8), 512px-x2 for 16. For a patch of 4, or
model.scale=1, set model.patch=2.
"""

import ml_collections

from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING

VARIANTS = ("world", "reference", "emoji", "photos", "photos-256", "tiny", "512px-x2")


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "refiner"
    c.seed = 0

    c.model = m = ml_collections.ConfigDict()
    m.scale = 2  # output pixels for one of the tokenizer, along each side: 1, 2 or 4
    m.patch = 4  # output pixels a side that a place of the finest grid stands for
    m.channels, m.blocks = (64, 96, 128), 1  # widths of the grids, each of half the size of the last
    m.certain = 1  # cosines along each side of such a square that are told, not drawn: what is larger than it
    m.discriminator = dict(width=32, layers=3)  # where loss.gan.weight is not 0
    m.angles = 128  # width of what is told of the angles of a step
    m.flow = True  # False: the deterministic up-sampler
    m.dtype = "float32"

    c.data = d = ml_collections.ConfigDict()
    d.tokenizer = ""  # workdir of the tokenizer run
    d.upsampler = ""  # run of model.flow=False, whose image is then the base; else the tokenizer's, enlarged
    d.source = dict(spec="world:train/draw+style", size=(128, 128), seed=0, documents=16_000)
    d.batch_size = 8
    d.augment = False  # random resized crops, mirrored half of the time
    d.max_bad = 0.1  # share of bad images above which the run gives up
    d.threads, d.workers = 1, 0  # that make batches ahead: threads or, if not 0, processes
    c.held_out = dict(spec="world:valid/draw+style", size=(128, 128), seed=0, documents=128)

    c.loss = l = ml_collections.ConfigDict()  # see stages/refiner.py
    l.drop, l.noise, l.near = 0.1, 0.05, 0.5
    l.uniform, l.mean, l.width = 0.2, 0.0, 1.2
    l.few_every, l.most_steps = 4, 8
    l.gan = dict(weight=0.0, kind="hinge", start=0, r1_weight=0.0, r1_every=16)  # of what one step makes

    c.steps = 4000
    c.refine_steps = 4  # of the refinement that is measured
    c.optimizer = OPTIMIZER | dict(adam_learning_rate=2e-3)
    c.optimizer.groups = dict(
        discriminator=dict(name="adamw", learning_rate=4e-4, beta1=0.5, beta2=0.99, clip=0.0)
    )
    c.ema = 0.999
    c.log_every, c.evaluate_every, c.save_every, c.keep = 100, 1000, 500, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True  # on CPU faster for large models: see runtime/memory.py

    if variant == "reference":  # of the released model: 64 px pictures at 128, by codes of 4 x 4 pixels
        m.flow, m.channels = False, (64, 96)
        d.source.spec, c.held_out.spec = "world:train/draw+style+sign", "world:valid/draw+style+sign"
        c.steps = 2400
    if variant in ("emoji", "photos", "photos-256"):  # real pictures, from img2dataset tars
        name, side = variant.partition("-")[0], 256 if variant == "photos-256" else 128
        d.source = dict(
            spec=f"tars:data/{name}/*.tar", size=(side, side), seed=0, split="train", documents=None
        )
        d.source.split_by = "base" if name == "emoji" else "key"
        c.held_out = dict(d.source, split="test", documents=256)
        d.augment = name == "photos" and side == 128  # crops of larger pictures, never enlarged ones
    if variant == "tiny":  # for tests: seconds
        m.channels, m.angles, m.patch = (16, 16), 16, 4
        d.source = dict(spec="world:train", size=(64, 64), seed=0, documents=64)
        c.held_out = dict(spec="world:valid", size=(64, 64), seed=0, documents=8)
        c.steps, c.log_every, c.evaluate_every, c.save_every = 20, 10, 20, 10
        c.optimizer.warmup = 2
    if variant == "512px-x2":  # for accelerators: 256 px of a tokenizer with patches of 16 pixels, to 512
        m.channels, m.blocks, m.angles, m.dtype = (192, 384, 768, 768), 2, 512, "bfloat16"
        d.source = dict(spec="tars:data/images/*.tar", size=(512, 512), seed=0, split="train", holdout=0.01)
        c.held_out = dict(d.source, split="test", documents=2000)
        d.batch_size, d.augment, d.workers = 128, True, 8
        c.steps, c.evaluate_every, c.save_every, c.keep = 200_000, 10_000, 5000, 3
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate, c.optimizer.warmup = 5e-3, 5e-4, 5000
        c.ema, c.spike, c.keep_every, c.keep_pages = 0.9999, 20.0, 50_000, False
    return c
